"""THE table between Hugging Face's Qwen2 weights and megatron-core's: data only, read in both directions.

Import, export and the weight stream to the sampler all walk these rows; `layout` says how a row's tensors are cut and
fused, and layout.py does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Layout = Literal["replicated", "vocab", "columns", "qkv", "gate_up"]
Spec = Literal["local", "transformer_engine"]
Axis = Literal["vocab_size", "hidden_size", "query_size", "kv_size", "intermediate_size"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of. `{layer}` stands for the global layer index, from 0."""

    megatron: str
    """Its name under the local layer spec."""
    megatron_te: str | None = None
    """Its name under the Transformer Engine spec, where that differs: a norm is part of the linear after it."""
    hf: tuple[str, ...]
    """Names of the HF tensors, in the order in which they are fused."""
    axes: tuple[tuple[Axis, ...], ...]
    """The shape of each HF tensor, in fields of `ModelShape`."""
    layout: Layout
    """How the HF tensors lie in the Megatron parameter, and how tensor-parallel ranks share it."""

    def of_layer(self, layer: int) -> Rule:
        """The row with `{layer}` filled in."""
        return replace(
            self,
            megatron=self.megatron.format(layer=layer),
            megatron_te=self.megatron_te and self.megatron_te.format(layer=layer),
            hf=tuple(name.format(layer=layer) for name in self.hf),
        )


EMBEDDING = Rule(
    megatron="embedding.word_embeddings.weight",
    hf=("model.embed_tokens.weight",),
    axes=(("vocab_size", "hidden_size"),),
    layout="vocab",
)

LAYER = (
    Rule(
        megatron="decoder.layers.{layer}.input_layernorm.weight",
        megatron_te="decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        hf=("model.layers.{layer}.input_layernorm.weight",),
        axes=(("hidden_size",),),
        layout="replicated",
    ),
    Rule(
        megatron="decoder.layers.{layer}.self_attention.linear_qkv.weight",
        hf=(
            "model.layers.{layer}.self_attn.q_proj.weight",
            "model.layers.{layer}.self_attn.k_proj.weight",
            "model.layers.{layer}.self_attn.v_proj.weight",
        ),
        axes=(("query_size", "hidden_size"), ("kv_size", "hidden_size"), ("kv_size", "hidden_size")),
        layout="qkv",
    ),
    Rule(
        megatron="decoder.layers.{layer}.self_attention.linear_qkv.bias",
        hf=(
            "model.layers.{layer}.self_attn.q_proj.bias",
            "model.layers.{layer}.self_attn.k_proj.bias",
            "model.layers.{layer}.self_attn.v_proj.bias",
        ),
        axes=(("query_size",), ("kv_size",), ("kv_size",)),
        layout="qkv",
    ),
    Rule(
        megatron="decoder.layers.{layer}.self_attention.linear_proj.weight",
        hf=("model.layers.{layer}.self_attn.o_proj.weight",),
        axes=(("hidden_size", "query_size"),),
        layout="columns",
    ),
    Rule(
        megatron="decoder.layers.{layer}.pre_mlp_layernorm.weight",
        megatron_te="decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        hf=("model.layers.{layer}.post_attention_layernorm.weight",),
        axes=(("hidden_size",),),
        layout="replicated",
    ),
    Rule(
        megatron="decoder.layers.{layer}.mlp.linear_fc1.weight",
        hf=("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        axes=(("intermediate_size", "hidden_size"), ("intermediate_size", "hidden_size")),
        layout="gate_up",
    ),
    Rule(
        megatron="decoder.layers.{layer}.mlp.linear_fc2.weight",
        hf=("model.layers.{layer}.mlp.down_proj.weight",),
        axes=(("hidden_size", "intermediate_size"),),
        layout="columns",
    ),
)

FINAL_NORM = Rule(
    megatron="decoder.final_layernorm.weight",
    hf=("model.norm.weight",),
    axes=(("hidden_size",),),
    layout="replicated",
)

OUTPUT = Rule(  # untied models only; a tied one has its rows in the embedding
    megatron="output_layer.weight",
    hf=("lm_head.weight",),
    axes=(("vocab_size", "hidden_size"),),
    layout="vocab",
)


def rules_for(*, num_layers: int, tied: bool, spec: Spec) -> list[Rule]:
    """The rows that a model has, layers filled in and `megatron` named as `spec` names it, in HF's order.

    A tied model has no row for its output layer: what a last pipeline stage holds under `output_layer.weight` is then a
    copy of the embedding, `EMBEDDING`'s row.
    """

    def rows() -> Iterator[Rule]:
        yield EMBEDDING
        for layer in range(num_layers):
            yield from (rule.of_layer(layer) for rule in LAYER)
        yield FINAL_NORM
        if not tied:
            yield OUTPUT

    if spec == "local":
        return list(rows())
    return [replace(rule, megatron=rule.megatron_te or rule.megatron) for rule in rows()]
