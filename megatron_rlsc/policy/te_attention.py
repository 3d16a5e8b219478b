"""Transformer Engine's attention over packs whose documents share prompts. Importable where Transformer Engine is."""

from __future__ import annotations

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rlsc.policy.attention import SharedPromptParams


class SharedPromptTEAttention(TEDotProductAttention):
    """Megatron's own, but for `SharedPromptParams`: those need a mask that its forward has no name for."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See `attention.PackedAttention.forward`; the shapes are the same."""
        if not isinstance(packed_seq_params, SharedPromptParams):
            return super().forward(
                query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        shared = packed_seq_params.shared
        # A document's last query sees all of its keys: cuDNN (9.6 and newer) and flash-attn (2.1 and newer) align the
        # causal mask so. Backends that do not are left out by TE, which then raises, the unfused one being off.
        return super(TEDotProductAttention, self).forward(
            query,
            key[shared.kv_index],
            value[shared.kv_index],
            qkv_format="thd",
            cu_seqlens_q=packed_seq_params.cu_seqlens,
            cu_seqlens_kv=shared.cu_seqlens_kv,
            max_seqlen_q=shared.max_seqlen_q,
            max_seqlen_kv=packed_seq_params.max_seqlen_kv,
            attn_mask_type="padding_causal_bottom_right",
        )
