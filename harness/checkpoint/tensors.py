"""Tensors on their way to the disk and back, in the format of safetensors (github.com/huggingface/safetensors).

The library writes from one block of memory that holds the whole file; here every tensor is written from where it is,
and hashed on the way.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.errors import CheckpointError
from harness.record.files import write_durably
from harness.record.manifest import COMMIT, KINDS, FileEntry, Manifest

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES, FLOATING = frozenset(_TYPES.values()), frozenset({"F64", "F32", "F16", "BF16"})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> FileEntry:
    """Write tensors of the CPU durably, one after another; a mapping that reads lazily holds one at a time."""
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    # Large elements first, so that each tensor begins at a multiple of its element's size.
    order = sorted(shapes, key=lambda name: (-shapes[name][0].itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = shapes[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    chunks = (chunk for name in order for chunk in _bytes(tensors[name]))
    size, digest = write_durably(path, _chain([len(text).to_bytes(8, "little") + text], chunks))
    return FileEntry(path.name, size, digest)


def _chain(*parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        yield from part


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor without a copy, if there are any."""
    if tensor.numel():
        yield tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """Return 32 hexadecimal digits (XXH3, 128 bits) of a tensor's type, shape and bits, wherever it is."""
    digest = xxhash.xxh3_128(f"{_TYPES[tensor.dtype]}{list(tensor.shape)}".encode())
    for chunk in _bytes(tensor.cpu()):
        digest.update(chunk)
    return digest.hexdigest()


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some files by name, each read from disk when it is asked for.

    Args:
        prefix: only what begins with it is here, by the rest of its name.
    Raises:
        CheckpointError: a file holds something else.
    """

    def __init__(self, directory: Path, file_names: Iterable[str], *, prefix: str = "") -> None:
        self._prefix = prefix
        self._file_of: dict[str, Any] = {}
        for file_name in file_names:
            try:
                file: Any = safe_open(directory / file_name, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(
                    f"{directory / file_name} is no file of tensors ({error}), though its digest is the one in "
                    f"{COMMIT}: this harness has not written it. Take another checkpoint"
                ) from error
            names: list[str] = file.keys()
            self._file_of |= {name.removeprefix(prefix): file for name in names if name.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(self._prefix + name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def layout(self) -> dict[str, tuple[str, list[int]]]:
        """Return the type, such as F32, and the shape of every tensor, without reading any."""
        slices = {name: file.get_slice(self._prefix + name) for name, file in self._file_of.items()}
        return {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}


class SavedState(Mapping[str, Tensor]):
    """The tensors of a verified checkpoint by the keys of `Strategy.state`, each read when it is asked for."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.kinds = {kind: TensorFiles(directory, manifest.names(kind)) for kind in KINDS}

    def __getitem__(self, key: str) -> Tensor:
        kind, _, name = key.partition("/")
        return self.kinds[kind][name]

    def __iter__(self) -> Iterator[str]:
        return (f"{kind}/{name}" for kind, tensors in self.kinds.items() for name in tensors)

    def __len__(self) -> int:
        return sum(map(len, self.kinds.values()))

    def layout(self) -> dict[str, tuple[str, list[int]]]:
        """Return the type and the shape of every tensor, without reading any."""
        return {f"{kind}/{name}": entry for kind, files in self.kinds.items() for name, entry in files.layout().items()}
