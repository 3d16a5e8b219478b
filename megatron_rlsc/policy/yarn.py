"""YaRN in megatron-core's GPTModel, which reads its settings from fields that TransformerConfig does not declare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import TransformerConfig

from megatron_rlsc.conversion.rope import Yarn


@dataclass
class YarnTransformerConfig(TransformerConfig):
    """What gpt_model.py looks up for `position_embedding_type="yarn"`, and attention.py for every query and key."""

    yarn_rotary_scaling_factor: float = 1.0
    yarn_original_max_position_embeddings: int = 0
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    yarn_correction_range_round_to_int: bool = True


def yarn_fields(yarn: Yarn) -> dict[str, Any]:
    """Its settings in Megatron's names.

    Megatron's attention factor is (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1)
    (yarn_rotary_pos_embedding.py); with mscale_all_dim 0, this mscale makes it the one asked for.
    """
    return {
        "yarn_rotary_scaling_factor": yarn.factor,
        "yarn_original_max_position_embeddings": yarn.original_max_position_embeddings,
        "yarn_beta_fast": yarn.beta_fast,
        "yarn_beta_slow": yarn.beta_slow,
        "yarn_mscale": (yarn.attention_factor - 1) / (0.1 * math.log(yarn.factor)),
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": yarn.truncate,
    }
