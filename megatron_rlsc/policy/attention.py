"""Causal attention over packed documents, for the local layer spec: megatron's own refuses `thd`.

Documents are attended one by one, so that memory grows with the pack's length, not with its square. Transformer
Engine's attention takes this place on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedAttention(torch.nn.Module):
    """Stands where megatron.core.transformer.dot_product_attention.DotProductAttention stands in the local spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.attention_dropout == 0.0, "Qwen2.5 trains without attention dropout"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams,
    ) -> Tensor:
        """Attends within each document of the pack.

        Args:
            query: [t, heads, head_dim], of this TP rank.
            key, value: [t, kv_heads, head_dim]; each serves heads / kv_heads query heads.
            packed_seq_params: cu_seqlens_q, [d + 1], says where documents begin.

        Returns:
            [t, heads * head_dim]
        """
        groups = query.shape[1] // key.shape[1]
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        # [heads, t, head_dim], each key head repeated for the query heads that it serves
        q = query.transpose(0, 1)
        k = key.repeat_interleave(groups, dim=1).transpose(0, 1)
        v = value.repeat_interleave(groups, dim=1).transpose(0, 1)
        documents = [
            F.scaled_dot_product_attention(
                q_doc[None], k_doc[None], v_doc[None], is_causal=True, scale=self.softmax_scale
            )
            for q_doc, k_doc, v_doc in zip(*(t.split(lengths, dim=1) for t in (q, k, v)), strict=True)
        ]
        return torch.cat(documents, dim=2)[0].transpose(0, 1).flatten(1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: attention has no parameters."""
        return {}
