"""Our files of tensors are those of safetensors, written from where the tensors are."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoint.tensors import TensorFiles, tensor_digest, write_tensors
from tests.distributed.ranks import run_ranks

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.tuples(st.sampled_from([*TYPES, torch.uint8, torch.bool]), shapes, st.integers(0, 2**31)).map(
    lambda drawn: random_tensor(*drawn)
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__")


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any bits, NaN with payloads too."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    values = torch.randint(2 if dtype == torch.bool else 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return values.view(dtype).reshape(shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    as_bytes = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, tensors, max_size=6))
def test_the_library_reads_back_every_bit(tmp_path: Path, told: dict[str, Tensor]) -> None:
    path = tmp_path / "some.safetensors"
    entry = write_tensors(path, told)
    assert entry.size == path.stat().st_size
    for found in (safetensors.torch.load_file(path), dict(TensorFiles(tmp_path, [path.name]))):
        assert found.keys() == told.keys()
        assert all(same_bits(found[name], told[name]) for name in told)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, tensors, max_size=6))
def test_tensors_begin_at_a_multiple_of_their_elements_size(tmp_path: Path, told: dict[str, Tensor]) -> None:
    write_tensors(tmp_path / "some.safetensors", told)
    content = (tmp_path / "some.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert all(header[name]["data_offsets"][0] % told[name].element_size() == 0 for name in told)


def test_what_is_not_contiguous_is_written_as_it_reads(tmp_path: Path) -> None:
    grid = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "some.safetensors", {"turned": grid.T, "part": grid[:, 1]})
    found = safetensors.torch.load_file(tmp_path / "some.safetensors")
    assert torch.equal(found["turned"], grid.T)
    assert torch.equal(found["part"], grid[:, 1])


def test_a_digest_tells_type_shape_and_bits_apart() -> None:
    zeros = torch.zeros(2, 3)
    different = [zeros, zeros.T, zeros.int(), -zeros, zeros.reshape(6), torch.full((2, 3), torch.nan)]
    assert len({tensor_digest(tensor) for tensor in different}) == len(different)
    assert tensor_digest(torch.arange(6.0).reshape(2, 3).T) == tensor_digest(torch.tensor([[0.0, 3], [1, 4], [2, 5]]))


def kibibytes_to_write(path: str, num_tensors: int) -> int:
    """Return by how much the most memory of this process grows when it writes tensors of 10 MB each."""
    tensors = {str(index): torch.full((2_500_000,), float(index)) for index in range(num_tensors)}
    write_tensors(Path(path).with_name("warm.safetensors"), {"0": torch.zeros(10)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_tensors(Path(path), tensors)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_writing_40_megabytes_takes_no_memory_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    (grown,) = run_ranks(1, kibibytes_to_write, str(path), 4)
    assert path.stat().st_size > 40_000_000
    assert grown < 4_000, "a copy of the tensors, or of the file, would take 40 MB"


def test_a_write_that_the_disk_refuses_is_an_os_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "some.safetensors", {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
