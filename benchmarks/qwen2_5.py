"""Shapes of Qwen2.5, for what needs no weights of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rlsc.conversion.shape import ModelShape

Sizes = tuple[int, int, int, int, int, int]
"""Hidden, MLP, layers, heads, KV heads, vocabulary."""
SIZES: dict[str, Sizes] = {
    "0.5B": (896, 4864, 24, 14, 2, 151936),
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "7B": (3584, 18944, 28, 28, 4, 152064),
    "14B": (5120, 13824, 48, 40, 8, 152064),
    "32B": (5120, 27648, 64, 40, 8, 152064),
    "72B": (8192, 29568, 80, 64, 8, 152064),
}
"""Of the models' config.json."""


def shape_of(sizes: Sizes, *, tied: bool) -> ModelShape:
    """The vocabulary as it is, not padded for a layout."""
    from megatron_rlsc.conversion.shape import ModelShape

    hidden, mlp, layers, heads, kv_heads, vocabulary = sizes
    return ModelShape(
        vocab_size=vocabulary,
        padded_vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )
