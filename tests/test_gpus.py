"""What is decided by the GPUs that there are, without any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from harness.errors import ConfigError
from harness.ranks.env import Placement
from harness.ranks.join import backend_for, join_ranks, refuse_unusable_gpus
from harness.strategy.build import check_bf16

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine")


def test_ranks_on_gpus_of_their_own_reduce_over_nccl_and_nothing_is_said() -> None:
    assert backend_for(["GPU-a", "GPU-b", "GPU-c"]) == ("cpu:gloo,cuda:nccl", ())
    assert backend_for(["GPU-a"]) == ("cpu:gloo,cuda:nccl", ())


def test_ranks_that_share_a_gpu_reduce_over_gloo_and_say_which_they_are() -> None:
    backend, notices = backend_for(["GPU-a", "GPU-b", "GPU-a", "GPU-c"])
    assert backend == "gloo"
    assert len(notices) == 1
    assert notices[0].startswith("ranks 0, 2 share a GPU, which NCCL refuses")


def test_cpu_ranks_reduce_over_gloo() -> None:
    assert backend_for([]) == ("gloo", ())


@NO_CUDA
def test_a_gpu_that_torch_cannot_use_is_refused_with_torchs_reason_and_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"nvidia-smi lists 2 GPUs, but torch .* can use none") as caught:
        refuse_unusable_gpus(2)
    assert "set CUDA_VISIBLE_DEVICES= to train on CPU ranks" in str(caught.value)
    if torch.version.cuda is None:
        assert "Torch not compiled with CUDA enabled" in str(caught.value)
    refuse_unusable_gpus(0)


@NO_CUDA
def test_a_rank_does_not_train_on_cpus_where_nvidia_smi_lists_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-aaaa)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match="nvidia-smi lists 1 GPU, but"):
        join_ranks(Placement(), timeout_seconds=5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # CPU ranks were asked for
    assert join_ranks(Placement(), timeout_seconds=5).device.type == "cpu"


def test_bf16_is_refused_on_a_gpu_that_has_none_and_the_precisions_that_it_has_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"is_bf16_supported": False, "get_device_capability": (7, 5), "get_device_name": "Tesla T4"}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    with pytest.raises(ConfigError, match=r"Tesla T4 has no bf16 .* 7\.5.* use strategy\.precision=fp16"):
        check_bf16(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    check_bf16(torch.device("cuda", 0))
