"""The files of an export, and saved tensors that become a network's."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from harness.errors import CheckpointError
from harness.strategy.base import model_tensors

MODEL, CONFIG, DESCRIPTION = "model.safetensors", "config.json", "harness.json"


def fill(network: nn.Module, saved: Mapping[str, Tensor], *, path: str) -> None:
    """Put saved tensors into a network, which takes on their type.

    Raises:
        CheckpointError: they are not this network's.
    """
    wanted = dict(model_tensors(network))
    others = sorted(wanted.keys() ^ saved.keys()) or [
        name for name, tensor in wanted.items() if tensor.shape != saved[name].shape
    ]
    if others:
        raise CheckpointError(
            f"the checkpoint and {path} are of different networks: {len(others)} tensors are not the same, such as "
            f"{others[0]}. Put the directory back that the run began with"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.data = saved[name]
