"""One safetensors file: a header that is checked before it is believed, tensors read and written one at a time.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header, the header as JSON
{name: {dtype, shape, data_offsets}}, then the tensors' bytes without gaps. Reading goes through read(2), not mmap, so
that memory holds what is in use and no more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as in the reference implementation


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, in the order of their bytes. Raises ValueError where header and file do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(LENGTH_BYTES)
        if first == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` where it came from")
        length = int.from_bytes(first, "little")
        data_start = LENGTH_BYTES + length
        if len(first) < LENGTH_BYTES or data_start > size or length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its {size} bytes are too few for the header of {length} bytes that it announces")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, not an object")
    entries = [_entry(path, name, fields, data_start) for name, fields in header.items() if name != "__metadata__"]
    entries.sort(key=lambda entry: entry.offset)
    end = data_start
    for entry in entries:
        if entry.offset != end:
            raise _damaged(path, f"{entry.name} begins at byte {entry.offset}, the tensor before it ends at byte {end}")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"it has {size} bytes, its header describes {end}")
    return {entry.name: entry for entry in entries}


def read_rows(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """[stop - start, ...] rows of a tensor, as a copy in memory. Raises ValueError where the file has shrunk."""
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    data = bytearray((stop - start) * row)
    with entry.path.open("rb") as file:
        file.seek(entry.offset + start * row)
        got = file.readinto(data)
    if got != len(data):
        raise _damaged(entry.path, f"{entry.name} ends after {got} of the {len(data)} bytes asked for")
    return torch.frombuffer(data, dtype=entry.dtype).view(stop - start, *entry.shape[1:])


def read_tensor(entry: TensorEntry) -> Tensor:
    """The whole tensor, as a copy in memory."""
    return read_rows(entry, 0, entry.shape[0])


def create(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[TensorEntry]:
    """Makes a file of its final size: the header, and a hole where `write_tensor` is to put each tensor."""
    header, ends = build_header(shapes, dtype), _ends(shapes, dtype)
    with path.open("xb") as file:
        file.write(header)
        file.truncate(len(header) + (ends[-1] if ends else 0))
    return [
        TensorEntry(path=path, name=name, dtype=dtype, shape=shape, offset=len(header) + begin)
        for (name, shape), begin in zip(shapes.items(), [0, *ends])
    ]


def build_header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The first bytes of a file; the tensors follow in this order, without gaps."""
    ends = _ends(shapes, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, shape), begin, end in zip(shapes.items(), [0, *ends], ends):
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # keeps the tensors aligned for those who map the file
    return len(raw).to_bytes(LENGTH_BYTES, "little") + raw


def write_tensor(entry: TensorEntry, tensor: Tensor) -> None:
    """Puts a tensor of the entry's shape and dtype into its place."""
    assert tensor.shape == entry.shape and tensor.dtype == entry.dtype, (entry, tensor.shape, tensor.dtype)
    with entry.path.open("r+b") as file:
        file.seek(entry.offset)
        file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def _ends(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> list[int]:
    """Of each tensor, in bytes behind the header."""
    return list(accumulate(math.prod(shape) * dtype.itemsize for shape in shapes.values()))


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is truncated or damaged: {reason}. Copy or download it again.")


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands in it twice")
        found[name] = value
    return found


def _entry(path: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        raise _damaged(path, f"{name} is described by a {type(fields).__name__}")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name} has shape {shape!r} and data_offsets {offsets!r}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {name} is of dtype {dtype!r}; weights must be one of {', '.join(DTYPES)}")
    begin, end = offsets
    entry = TensorEntry(path=path, name=name, dtype=DTYPES[dtype], shape=tuple(shape), offset=data_start + begin)
    if end - begin != entry.nbytes:
        raise _damaged(path, f"{name} {entry.shape} in {dtype} takes {entry.nbytes} bytes, not {end - begin}")
    return entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
