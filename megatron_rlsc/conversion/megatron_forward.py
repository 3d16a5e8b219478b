"""Log-probabilities from a Megatron checkpoint's own layout, in plain torch: a few rows of one matrix in memory.

Written from megatron-core's modules (attention.py, mlp.py), not from the table: a table that is wrong both ways gives
back equal tensors, and other log-probabilities here. tests/policy/test_converted.py holds it against megatron-core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rlsc.conversion.blocks import Block, BlockReader, cut
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.conversion.torch_dist import TorchDist

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronForward:
    """A model in a checkpoint, computed in float32."""

    checkpoint: TorchDist
    shape: ModelShape

    def embed(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """[tokens, hidden] of each text."""
        return [torch.cat([self._rows(EMBEDDING, int(i), int(i) + 1) for i in text]) for text in texts]

    def layer(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The residual stream of each text behind a layer, from 0."""
        prefix = f"decoder.layers.{index}"
        attention, mlp = f"{prefix}.self_attention", f"{prefix}.mlp"
        lengths = [len(text) for text in hidden]
        stream = torch.cat(list(hidden))

        normed = self._norm(f"{attention}.linear_qkv.layer_norm_weight", stream)
        qkv = self._linear(f"{attention}.linear_qkv.weight", normed) + self._vector(f"{attention}.linear_qkv.bias")
        context = torch.cat([self._attend(text) for text in qkv.split(lengths)])
        stream = stream + self._linear(f"{attention}.linear_proj.weight", context)

        normed = self._norm(f"{mlp}.linear_fc1.layer_norm_weight", stream)
        gate, up = self._linear(f"{mlp}.linear_fc1.weight", normed).chunk(2, dim=-1)
        stream = stream + self._linear(f"{mlp}.linear_fc2.weight", F.silu(gate) * up)
        return list(stream.split(lengths))

    def logprobs(self, hidden: Sequence[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
        """[tokens - 1] of each text: of every token but the first, after those before it."""
        stream = self._norm(FINAL_NORM, torch.cat([text[:-1] for text in hidden]))
        targets = torch.cat([text[1:] for text in texts])
        total = torch.full((len(targets),), -math.inf)
        chosen = torch.zeros(len(targets))
        name = EMBEDDING if self.shape.tie_word_embeddings else OUTPUT
        for start, stop in self._cuts(self.shape.vocab_size):
            logits = stream @ self._rows(name, start, stop).T
            total = torch.logaddexp(total, logits.logsumexp(-1))
            here = (targets >= start) & (targets < stop)
            chosen[here] = logits[here].gather(1, targets[here, None] - start)[:, 0]
        return list((chosen - total).split([len(text) - 1 for text in texts]))

    def _attend(self, qkv: Tensor) -> Tensor:
        """[tokens, query_size] causal attention of one text; `qkv` lies group by group of the KV heads."""
        groups, head = self.shape.num_key_value_heads, self.shape.head_dim
        share = self.shape.num_attention_heads // groups
        query, key, value = qkv.view(len(qkv), groups, -1).split([share * head, head, head], dim=-1)
        cos, sin = self._rotation(len(qkv))
        heads = [_rotate(part.reshape(len(qkv), -1, head), cos, sin).transpose(0, 1) for part in (query, key)]
        out = F.scaled_dot_product_attention(
            heads[0][None], heads[1][None], value.transpose(0, 1)[None], is_causal=True, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """[length, 1, head_dim] cosine and sine."""
        frequencies, factor = _frequencies(self.shape)
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)[:, None]
        return angles.cos() * factor, angles.sin() * factor

    def _norm(self, name: str, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self._vector(name), self.shape.rms_norm_eps)

    def _linear(self, name: str, hidden: Tensor) -> Tensor:
        rows, columns = self.checkpoint.shape(name)
        return torch.cat([hidden @ self._rows(name, *piece).T for piece in cut(rows, columns * 4)], dim=-1)

    def _cuts(self, rows: int) -> list[tuple[int, int]]:
        return cut(rows, self.shape.hidden_size * 4)

    def _vector(self, name: str) -> Tensor:
        return self._rows(name, 0, self.checkpoint.shape(name)[0])[:, 0]

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, columns] float32"""
        columns = (*self.checkpoint.shape(name), 1)[1]
        parts = tuple(self.checkpoint.parts(name, start, stop, row=0))
        return BlockReader(torch.float32).read(Block(rows=stop - start, columns=columns, parts=parts))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _frequencies(shape: ModelShape) -> tuple[Tensor, float]:
    """[head_dim / 2] angles of a step, and the factor of rotated queries and keys (YaRN, arXiv 2309.00071)."""
    size, base, yarn = shape.head_dim, shape.rope_theta, shape.yarn
    plain = base ** -(torch.arange(0, size, 2).float() / size)
    if yarn is None:
        return plain, 1.0

    def dimension(turns: float) -> float:
        """In which a frequency makes so many turns within the original context."""
        return size * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = ((torch.arange(size // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp, yarn.attention_factor
