"""Writes a network of transformers so that transformers loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness.catalogue.pretrained import network as pretrained
from harness.catalogue.pretrained.section import PretrainedModel
from harness.errors import CheckpointError
from harness.exported import CONFIG, DESCRIPTION, fill
from harness.record.files import json_bytes, sync_directory, write_durably

KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Of what a pretrained model has beside its weights and config.json, as it was: tokenizer, templates, generation."""


def write_for_transformers(
    directory: Path, tensors: Mapping[str, Tensor], model: PretrainedModel, described: dict[str, Any]
) -> None:
    """Write a folder that transformers loads, and see that what it loads gives the logits of the run.

    Raises:
        CheckpointError: the tensors are of another network than the run's config.yaml describes now, or the logits
            are others.
    """
    network = pretrained.build(model, num_outputs=described["num_outputs"]).eval()
    fill(
        network, tensors, of=f"the checkpoint and {model.path}", advice="Put the directory back that the run began with"
    )
    longest = min(described["input_shape"][0], 16)
    rows = pretrained.some_rows(network, lengths=[longest, longest if network.pad_token_id is None else 3])
    with torch.no_grad():
        wanted = network(rows)
    try:
        exported = pretrained.save(network, directory, model, classes=described["preprocessing"].get("classes"))
    except SafetensorError as error:  # what that library makes of a full disk
        raise OSError(str(error)) from error
    for path in Path(model.path).iterdir():
        is_kept = path.suffix in KEPT_SUFFIXES and path.name != CONFIG and not path.name.endswith(".index.json")
        if is_kept and path.is_file():
            write_durably(directory / path.name, [path.read_bytes()])
    write_durably(directory / DESCRIPTION, [json_bytes(described)])
    for path in (*directory.iterdir(), directory):
        sync_directory(path)
    with torch.no_grad():
        found = exported(rows)
    difference = pretrained.largest_difference(wanted, found)
    if not difference <= pretrained.SAME:
        raise CheckpointError(
            f"nothing was exported: what transformers loads from the export has other logits than the run (by "
            f"{difference:.2g} of the largest). That is a mistake of ours or of transformers, not of the checkpoint: "
            f"please report it with {model.path}/config.json"
        )
