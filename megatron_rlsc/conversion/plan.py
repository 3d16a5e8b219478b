"""Which blocks a conversion reads and writes, in order: the table of rules.py as bytes on disk, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_rlsc.conversion.blocks import Block, Part, cut
from megatron_rlsc.conversion.hf import HFWeights, check_tensors
from megatron_rlsc.conversion.layout import segments
from megatron_rlsc.conversion.rules import Rule, rules_for
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.conversion.torch_dist import LAYERS, TorchDist

FILE_BYTES = 2**30
"""Of a file of a checkpoint: many files are written, and later checked, side by side."""
MODEL_KEYS = ("embedding.", "decoder.", "output_layer.")
"""What is not under these is an optimizer's, or nothing that a model reads."""
EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer that have an `_extra_state` under the Transformer Engine spec, and in megatron-core's own save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronBlock:
    """A block with its place in a checkpoint: one box of the tensor `key`."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    block: Block


def megatron_rules(shape: ModelShape) -> list[Rule]:
    """The rows of the table, named as a checkpoint names them: by the Transformer Engine spec, whatever the model's."""
    return rules_for(num_layers=shape.num_hidden_layers, tied=shape.tie_word_embeddings, spec="transformer_engine")


def megatron_shape(rule: Rule, shape: ModelShape) -> tuple[int, ...]:
    """Of a row's Megatron parameter, of one layer, the vocabulary not padded."""
    shapes = shape.hf_shapes(rule)
    return (sum(size[0] for size in shapes), *shapes[0][1:])


def stacked(name: str) -> tuple[str, tuple[int, ...]]:
    """A parameter's key in a checkpoint, and its layer there: (layer,), or () for what is no layer's."""
    if not name.startswith(LAYERS):
        return name, ()
    layer, _, rest = name.removeprefix(LAYERS).partition(".")
    return f"{LAYERS}{rest}", (int(layer),)


def megatron_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Key and global shape of every tensor of a checkpoint."""
    found = {}
    for rule in megatron_rules(shape):
        key, layer = stacked(rule.megatron)
        found[key] = (*[shape.num_hidden_layers for _ in layer], *megatron_shape(rule, shape))
    return found


def megatron_objects(shape: ModelShape) -> list[str]:
    """Keys of the empty `_extra_state`s, without which a Transformer Engine model does not load."""
    layers = shape.num_hidden_layers
    keys = [f"{LAYERS}{module}._extra_state/shard_{i}_{layers}" for module in EXTRA_STATES for i in range(layers)]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]


def megatron_blocks(weights: HFWeights, dtype: torch.dtype) -> Iterator[MegatronBlock]:
    """All of a checkpoint in `dtype`, from an HF folder, in HF's order."""
    for rule in megatron_rules(weights.shape):
        key, layer = stacked(rule.megatron)
        rows, *rest = megatron_shape(rule, weights.shape)
        columns = rest[0] if rest else 1
        # The halves of gate and up are parameters of their own to Megatron, which cuts each for its ranks.
        halves = 2 if rule.layout == "gate_up" else 1
        for half in range(halves):
            for start, stop in cut(rows // halves, columns * dtype.itemsize):
                first, last = start + half * rows // halves, stop + half * rows // halves
                yield MegatronBlock(
                    key=key,
                    offsets=(*layer, first, *[0 for _ in rest]),
                    sizes=(*[1 for _ in layer], last - first, *rest),
                    block=Block(
                        rows=last - first,
                        columns=columns,
                        parts=tuple(_hf_parts(rule, weights, first, last, columns)),
                    ),
                )


def _hf_parts(rule: Rule, weights: HFWeights, start: int, stop: int, columns: int) -> Iterator[Part]:
    """Where rows [start, stop) of a Megatron parameter lie in HF tensors."""
    for segment in segments(rule, weights.shape):
        first, last = max(start, segment.row), min(stop, segment.row + segment.rows)
        if first < last:
            entry = weights.entries[rule.hf[segment.hf]]
            row = segment.hf_row + first - segment.row
            yield Part(
                name=entry.name,
                path=entry.path,
                offset=entry.offset + row * columns * entry.dtype.itemsize,
                dtype=entry.dtype,
                row=first - start,
                rows=last - first,
                column=0,
                columns=columns,
            )


def hf_blocks(checkpoint: TorchDist, shape: ModelShape, dtype: torch.dtype) -> Iterator[tuple[str, Iterator[Block]]]:
    """(HF name, its blocks in order) of every HF tensor in `dtype`, from a checkpoint, in HF's order."""
    for rule in megatron_rules(shape):
        for index, (name, size) in enumerate(zip(rule.hf, shape.hf_shapes(rule))):
            yield name, _blocks_of(checkpoint, rule, index, size, shape, dtype)


def _blocks_of(
    checkpoint: TorchDist, rule: Rule, index: int, size: tuple[int, ...], shape: ModelShape, dtype: torch.dtype
) -> Iterator[Block]:
    columns = size[1] if len(size) > 1 else 1
    places = [segment for segment in segments(rule, shape) if segment.hf == index]
    for start, stop in cut(size[0], columns * dtype.itemsize):
        parts: list[Part] = []
        for place in places:
            first, last = max(start, place.hf_row), min(stop, place.hf_row + place.rows)
            if first < last:
                row = place.row + first - place.hf_row
                parts += checkpoint.parts(rule.megatron, row, row + last - first, row=first - start)
        yield Block(rows=stop - start, columns=columns, parts=tuple(parts))


def check_checkpoint(checkpoint: TorchDist, shape: ModelShape) -> None:
    """Raises ValueError that lists every tensor of the model that a checkpoint lacks, has besides, or has in another
    shape than config.json says. Rows of padding behind the vocabulary are none of these."""
    expected, found = {}, {}
    for key, size in megatron_tensors(shape).items():
        expected[key] = size
    separate = {rule.megatron: megatron_shape(rule, shape) for rule in megatron_rules(shape)}
    for key, tensor in checkpoint.tensors.items():
        if not key.startswith(MODEL_KEYS):
            continue
        if key in separate and key not in expected:  # layers that are not stacked
            expected.pop(stacked(key)[0], None)
            expected[key] = separate[key]
        size = tensor.shape
        if key in separate and _is_vocabulary(key) and size[1:] == expected[key][1:] and size[0] > expected[key][0]:
            size = expected[key]
        found[key] = size
    check_tensors(checkpoint.path, found, expected)


def _is_vocabulary(key: str) -> bool:
    return key.startswith(("embedding.", "output_layer."))


def checkpoint_dtypes(checkpoint: TorchDist) -> Mapping[str, torch.dtype]:
    """Of the model's tensors, by key."""
    return {key: tensor.dtype for key, tensor in checkpoint.tensors.items() if key.startswith(MODEL_KEYS)}
