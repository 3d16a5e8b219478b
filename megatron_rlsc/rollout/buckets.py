"""Buckets: the tensors of a push end to end in one piece of memory, with a checksum of its bytes.

Both sides import it: torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

BUCKET_BYTES = 2**28
"""Of one bucket; a larger tensor has one of its own."""
ALIGNED = 16
"""Bytes: where a tensor begins, so that its numbers can be read in place."""
WORD_BYTES = 8
CACHED_WORDS = 2**16
"""That a processor's cache holds."""
DEVICE_WORDS = 2**24
"""That keep a GPU busy."""
MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What a tensor is, without its numbers."""

    name: str
    """HF's."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to_json(self) -> list[Any]:
        return [self.name, str(self.dtype).removeprefix("torch."), list(self.shape)]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> TensorSpec:
        """Raises ValueError for what `to_json` does not write."""
        name, dtype_name, shape = fields
        dtype = getattr(torch, dtype_name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{dtype_name!r} of {name!r} is no dtype")
        return cls(name=name, dtype=dtype, shape=tuple(int(size) for size in shape))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Whole tensors, each at a multiple of ALIGNED bytes."""

    specs: tuple[TensorSpec, ...]
    data: Tensor
    """[bytes] uint8."""
    checksum: str


def fill_buckets(
    weights: Iterable[tuple[str, Tensor]], *, device: torch.device, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[Bucket]:
    """Copies a stream of (HF name, whole tensor) into buckets on `device`, which own their memory.

    Raises ValueError on NaN or infinity: vLLM would take it in silence and answer with token 0.
    """
    specs: list[TensorSpec] = []
    data, used = torch.empty(0, dtype=torch.uint8, device=device), 0

    def close() -> Bucket:
        return Bucket(specs=tuple(specs), data=data[:used], checksum=checksum(data[:used]))

    for name, tensor in weights:
        if not _is_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity: no such weights are sent")
        spec = TensorSpec(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        room = round_up(spec.nbytes)
        if specs and used + room > bucket_bytes:
            yield close()
            specs, used = [], 0
        if not specs:  # a new piece: what was handed over may still be read
            data = torch.empty(max(room, bucket_bytes), dtype=torch.uint8, device=device)
        data[used : used + spec.nbytes].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        data[used + spec.nbytes : used + room].zero_()
        specs, used = [*specs, spec], used + room
    if specs:
        yield close()


def unpack(specs: Iterable[TensorSpec], data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(HF name, tensor) of a bucket, in the bucket's own memory."""
    start = 0
    for spec in specs:
        yield spec.name, data[start : start + spec.nbytes].view(spec.dtype).view(spec.shape)
        start += round_up(spec.nbytes)


def bucket_nbytes(specs: Iterable[TensorSpec]) -> int:
    """Of the bucket that holds them."""
    return sum(round_up(spec.nbytes) for spec in specs)


def largest_bucket(specs: Sequence[TensorSpec]) -> int:
    """Bytes of the largest bucket that these tensors can come in."""
    return max(min(BUCKET_BYTES, bucket_nbytes(specs)), *(round_up(spec.nbytes) for spec in specs))


def checksum(data: Tensor) -> str:
    """Of bytes on any device, at the speed of its memory: the sum of their 64-bit words, and the sum of the words times
    their places, modulo 2^64, as 32 hex digits.

    It finds any flipped bit, any word in another's place, and zeros where data should be. It is no defence against
    somebody who means harm: those have no key.

    Args:
        data: [bytes] uint8, contiguous; zeros are added to the last word.
    """
    if data.numel() % WORD_BYTES:
        padded = data.new_zeros(-(-data.numel() // WORD_BYTES) * WORD_BYTES)
        padded[: data.numel()].copy_(data)
        data = padded
    words = data.view(torch.int64)
    total, weighted = _sums_on_device(words) if data.is_cuda else _sums_on_cpu(words.numpy().view(np.uint64))
    return f"{total & MASK:016x}{weighted & MASK:016x}"


def _sums_on_cpu(words: np.ndarray) -> tuple[int, int]:
    """Of one thread: torch's would wait for each other wherever vLLM has the cores."""
    places = np.arange(1, CACHED_WORDS + 1, dtype=np.uint64)
    total = weighted = 0
    for start in range(0, words.size, CACHED_WORDS):
        chunk = words[start : start + CACHED_WORDS]
        plain = int(chunk.sum())
        total += plain
        weighted += start * plain + int(np.dot(chunk, places[: chunk.size]))
    return total, weighted


def _sums_on_device(words: Tensor) -> tuple[int, int]:
    """The same, on any device; what is asked of a GPU is waited for once, at the end."""
    places = torch.arange(1, min(DEVICE_WORDS, words.numel()) + 1, device=words.device)
    total = weighted = torch.zeros((), dtype=torch.int64, device=words.device)  # where sums wrap, as they should
    for start in range(0, words.numel(), DEVICE_WORDS):
        chunk = words[start : start + DEVICE_WORDS]
        plain = chunk.sum()
        total = total + plain
        weighted = weighted + start * plain + (chunk * places[: chunk.numel()]).sum()
    return int(total), int(weighted)


def _is_finite(tensor: Tensor) -> bool:
    """By its extremes, which are NaN where a number is: one pass, sixty times as fast as looking at each."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED
