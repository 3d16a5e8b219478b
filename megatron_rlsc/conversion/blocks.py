"""Blocks: so many rows of a tensor that is to be written, and where on disk each part of them is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 32 * 2**20
"""In memory, of the tensor that is written."""

# What of a number is its size, and the size of infinity; NaN is above it.
FINITE: dict[torch.dtype, tuple[type[np.signedinteger], int, int]] = {
    torch.bfloat16: (np.int16, 0x7FFF, 0x7F80),
    torch.float16: (np.int16, 0x7FFF, 0x7C00),
    torch.float32: (np.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: (np.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
CACHED = 2**17
"""Numbers that a processor's cache holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """[rows, columns] numbers that lie together on disk, and where they go in a block."""

    name: str
    """Of the tensor that they are read from."""
    path: Path
    offset: int
    """Bytes from the start of the file."""
    dtype: torch.dtype
    row: int
    rows: int
    column: int
    columns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Rows of one tensor, as a matrix: a vector has one column."""

    rows: int
    columns: int
    parts: tuple[Part, ...]
    """Together all of it, each number once."""

    def nbytes(self, dtype: torch.dtype) -> int:
        return self.rows * self.columns * dtype.itemsize


def cut(rows: int, row_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> list[tuple[int, int]]:
    """(start, stop) of blocks of at most `block_bytes`, a power of two of them: there TP ranks cut too."""
    count = 1
    while count < rows and -(-rows // count) * row_bytes > block_bytes:
        count *= 2
    size = -(-rows // count)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


class BlockReader:
    """Reads blocks into memory that it keeps; a block is gone when the next one is read."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._target = self._staging = torch.empty(0, dtype=torch.uint8)

    def read(self, block: Block) -> Tensor:
        """[rows, columns] in the reader's dtype. Raises ValueError where a file has shrunk, or a number is NaN or
        infinite, be it through the cast."""
        if len(self._target) < block.nbytes(self.dtype):
            self._target = torch.empty(block.nbytes(self.dtype), dtype=torch.uint8)
        target = self._target[: block.nbytes(self.dtype)].view(self.dtype).view(block.rows, block.columns)
        for parts in _runs(block.parts):
            part = parts[0]
            if part.dtype == self.dtype and part.columns == block.columns:
                _read(part, [target[each.row : each.row + each.rows] for each in parts])
            else:
                for each in parts:
                    staged = self._stage(each)
                    _read(each, [staged])
                    _place(target, each).copy_(staged)
        if not is_finite(target):
            raise NotFinite({part.name for part in block.parts if not is_finite(_place(target, part).contiguous())})
        return target

    def _stage(self, part: Part) -> Tensor:
        nbytes = part.rows * part.columns * part.dtype.itemsize
        if len(self._staging) < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8)
        return self._staging[:nbytes].view(part.dtype).view(part.rows, part.columns)


class NotFinite(ValueError):
    """A block holds NaN or infinity; `names` says from which tensors."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(f"{', '.join(sorted(names))} hold NaN or infinity")
        self.names = names


def is_finite(tensor: Tensor) -> bool:
    """Whether a contiguous tensor holds neither NaN nor infinity. Ten times as fast as a sum: it looks at bits."""
    kind, size, infinity = FINITE[tensor.dtype]
    bits = as_bytes(tensor).view(kind)
    sizes = np.empty(min(CACHED, bits.size), kind)
    for start in range(0, bits.size, CACHED):
        piece = bits[start : start + CACHED]
        if np.bitwise_and(piece, size, out=sizes[: piece.size]).max() >= infinity:
            return False
    return True


def as_bytes(tensor: Tensor) -> np.ndarray:
    """[nbytes] uint8 of a contiguous tensor, in its own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _place(target: Tensor, part: Part) -> Tensor:
    return target[part.row : part.row + part.rows, part.column : part.column + part.columns]


def _runs(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that follow each other on disk, together: one system call reads them into their places."""
    run: list[Part] = []
    for part in sorted(parts, key=lambda part: (str(part.path), part.offset)):
        if run:
            last = run[-1]
            end = last.offset + last.rows * last.columns * last.dtype.itemsize
            if (part.path, part.offset, part.columns, part.dtype) != (last.path, end, last.columns, last.dtype):
                yield run
                run = []
        run.append(part)
    if run:
        yield run


def _read(first: Part, targets: Sequence[Tensor]) -> None:
    views = [as_bytes(target).data for target in targets]
    at, wanted = first.offset, math.fsum(view.nbytes for view in views)
    descriptor = os.open(first.path, os.O_RDONLY)
    try:
        while views:
            got = os.preadv(descriptor, views[:512], at)
            if got == 0:
                end = int(first.offset + wanted)
                raise ValueError(f"{first.path} is truncated: it ends at byte {at}, {end} are needed. Copy it again.")
            at += got
            while views and got >= views[0].nbytes:
                got -= views.pop(0).nbytes
            if views and got:
                views[0] = views[0][got:]
    finally:
        os.close(descriptor)
