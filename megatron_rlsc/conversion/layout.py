"""HF tensors <-> the shard of a Megatron parameter that one tensor-parallel rank holds. Pure, bitwise, no ranks.

`shard` and `gather` are each other's inverse. With tp_size 1 the shard is the whole Megatron parameter, which is also
what a distributed checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlsc.conversion.rules import Layout, Rule
from megatron_rlsc.conversion.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Rows that lie together both in an HF tensor of a row of the table and in the whole Megatron parameter."""

    hf: int
    """Which of the row's HF tensors."""
    hf_row: int
    row: int
    """Of the Megatron parameter."""
    rows: int


def segments(rule: Rule, shape: ModelShape) -> list[Segment]:
    """What `shard` with TP 1 does, as copies of rows: all of the parameter, in its order, less rows of padding."""
    return list(_segments(rule, shape))


def _segments(rule: Rule, shape: ModelShape) -> Iterator[Segment]:
    # One group for all layouts but qkv's, which lies group by group of its KV heads.
    groups = shape.num_key_value_heads if rule.layout == "qkv" else 1
    sizes = [size[0] // groups for size in shape.hf_shapes(rule)]
    row = 0
    for group in range(groups):
        for hf, rows in enumerate(sizes):
            yield Segment(hf=hf, hf_row=group * rows, row=row, rows=rows)
            row += rows


def shard(layout: Layout, tensors: Sequence[Tensor], shape: ModelShape, *, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a Megatron parameter that belongs to `tp_rank`. It may share memory with `tensors`.

    Args:
        tensors: the HF tensors of a row of the table, whole, in the row's order.

    Raises ValueError where `tp_size` does not divide what it shares out.
    """
    if layout == "replicated":
        (tensor,) = tensors
        return tensor
    if layout == "vocab":
        (rows,) = tensors
        return _vocab_rows(rows, shape.padded_vocab_size, tp_rank, tp_size)
    if layout == "columns":
        (tensor,) = tensors
        return _chunk(tensor, tp_rank, tp_size, dim=1).contiguous()
    if layout == "qkv":
        return _chunk(_fuse_qkv(tensors, shape.num_key_value_heads), tp_rank, tp_size)
    return torch.cat([_chunk(tensor, tp_rank, tp_size) for tensor in tensors])  # gate_up


def gather(layout: Layout, shards: Sequence[Tensor], shape: ModelShape) -> tuple[Tensor, ...]:
    """The HF tensors, whole, from the shards of all tensor-parallel ranks in order. Padding rows are cut."""
    if layout == "replicated":
        return (shards[0],)
    if layout == "vocab":
        return (torch.cat(list(shards))[: shape.vocab_size],)
    if layout == "columns":
        return (torch.cat(list(shards), dim=1),)
    if layout == "qkv":
        return _split_qkv(torch.cat(list(shards)), shape)
    gates, ups = zip(*(part.chunk(2) for part in shards))  # gate_up
    return torch.cat(gates), torch.cat(ups)


def _chunk(tensor: Tensor, tp_rank: int, tp_size: int, *, dim: int = 0) -> Tensor:
    if tensor.shape[dim] % tp_size:
        raise ValueError(f"TP {tp_size} does not divide dimension {dim} of a {tuple(tensor.shape)} tensor")
    return tensor.chunk(tp_size, dim=dim)[tp_rank]


def _vocab_rows(rows: Tensor, padded_vocab_size: int, tp_rank: int, tp_size: int) -> Tensor:
    """[padded_vocab_size / tp_size, hidden] the rank's rows, zeros where they lie behind the vocabulary."""
    if padded_vocab_size % tp_size:
        raise ValueError(f"TP {tp_size} does not divide the padded vocabulary of {padded_vocab_size} rows")
    count = padded_vocab_size // tp_size
    own = rows[tp_rank * count : (tp_rank + 1) * count]
    return own if len(own) == count else torch.cat([own, own.new_zeros(count - len(own), *own.shape[1:])])


def _fuse_qkv(tensors: Sequence[Tensor], groups: int) -> Tensor:
    """[query_size + 2 kv_size, ...] group by group: the query heads that share a KV head, then its key, then its value.

    Megatron cuts these rows into contiguous chunks. Where TP divides the groups, that is sharding q, k and v first and
    fusing after; where there are fewer groups than ranks, a chunk is part of a group.
    """
    return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)


def _split_qkv(fused: Tensor, shape: ModelShape) -> tuple[Tensor, ...]:
    """q [query_size, ...], k [kv_size, ...] and v [kv_size, ...] of `_fuse_qkv`."""
    groups = shape.num_key_value_heads
    sizes = [size // groups for size in (shape.query_size, shape.kv_size, shape.kv_size)]
    return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (groups, -1)).split(sizes, dim=1))
