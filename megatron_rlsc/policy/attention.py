"""Causal attention for the local layer spec, over packed documents, which megatron's own refuses, and padded ones.

Documents are attended one by one, so that memory grows with the pack's length, not with its square; under context
parallelism every rank gathers all keys and values. Transformer Engine's attention takes this place on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rlsc.types import MicroBatch, SharedPrompts


@dataclass(kw_only=True)
class SharedPromptParams(PackedSeqParams):
    """Of a pack whose documents share prompts.

    To Megatron the pack is one sequence, whose rotary embedding comes with a row for every token (model.py); the core
    attention alone knows of documents.
    """

    cu_seqlens: Tensor
    """[d + 1] where each document's queries begin."""
    shared: SharedPrompts


def packed_params(batch: MicroBatch) -> PackedSeqParams:
    """What Megatron is told of a pack's documents."""
    if batch.shared is None:
        bounds = batch.cu_seqlens
        longest = {"max_seqlen_q": batch.max_seqlen, "max_seqlen_kv": batch.max_seqlen}
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, **longest)
    whole = batch.cu_seqlens[[0, -1]]
    return SharedPromptParams(
        qkv_format="thd",
        cu_seqlens_q=whole,
        cu_seqlens_kv=whole,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        cu_seqlens=batch.cu_seqlens,
        shared=batch.shared,
    )


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
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.attention_dropout == 0.0, "Qwen2.5 trains without attention dropout"
        assert pg_collection is not None
        self.softmax_scale = softmax_scale
        self.cp_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends within each document: of a pack, or of a batch [s, d, ...] of padded ones.

        Args:
            query: [t, heads, head_dim], of this TP rank and this CP rank.
            key, value: [t, kv_heads, head_dim]; each serves heads / kv_heads query heads.
            packed_seq_params: cu_seqlens_q, [d + 1], says where documents begin in the whole pack; or `packed_params`.

        Returns:
            [t, heads * head_dim], or [s, d, heads * head_dim]
        """
        if packed_seq_params is None:
            return self._attend_padded(query, key, value)
        groups, cp_size = query.shape[1] // key.shape[1], self.cp_group.size()
        if isinstance(packed_seq_params, SharedPromptParams):
            shared = packed_seq_params.shared
            lengths, kv_lengths = packed_seq_params.cu_seqlens.diff().tolist(), shared.cu_seqlens_kv.diff().tolist()
            key, value = key[shared.kv_index], value[shared.kv_index]
        else:
            lengths = kv_lengths = (packed_seq_params.cu_seqlens_q.diff() // cp_size).tolist()
        if cp_size > 1:  # [cp * t, ...], rank after rank
            key, value = (gather_from_sequence_parallel_region(part, group=self.cp_group) for part in (key, value))
        # [heads, t, head_dim], each key head repeated for the query heads that it serves
        q = query.transpose(0, 1)
        k = key.repeat_interleave(groups, dim=1).transpose(0, 1)
        v = value.repeat_interleave(groups, dim=1).transpose(0, 1)
        # By document: [heads, length, head_dim] of q, and of k and v from every CP rank
        documents = zip(q.split(lengths, dim=1), *(self._by_document(part, kv_lengths) for part in (k, v)), strict=True)
        attended = [self._attend(*document) for document in documents]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    def _attend_padded(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[s, d, heads, head_dim] -> [s, d, heads * head_dim]. A document's padding lies behind it, where no token of
        it looks."""
        assert self.cp_group.size() == 1, "padded documents are not shared out"
        groups = query.shape[2] // key.shape[2]
        q, k, v = (  # [d, heads, s, head_dim]
            part.permute(1, 2, 0, 3) for part in (query, *(x.repeat_interleave(groups, dim=2) for x in (key, value)))
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _by_document(self, gathered: Tensor, lengths: list[int]) -> list[Tensor]:
        """[heads, cp * t, head_dim], rank after rank, as documents in their own order."""
        cp_size = self.cp_group.size()
        if cp_size == 1:
            return list(gathered.split(lengths, dim=1))
        ranks = [part.split(lengths, dim=1) for part in gathered.chunk(cp_size, dim=1)]
        documents = []
        for parts in zip(*ranks, strict=True):  # rank r has chunks r and 2 cp - 1 - r
            heads, tails = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
            documents.append(torch.cat([*heads, *reversed(tails)], dim=1))
        return documents

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One document: [heads, queries, head_dim] of this rank's chunks of it, against all of its keys."""
        if self.cp_group.size() == 1:
            return self._causal_behind(query, key, value)
        rank, chunk = self.cp_group.rank(), query.shape[1] // 2
        head, tail = query.split(chunk, dim=1)
        before_head, before_tail = rank * chunk, key.shape[1] - (rank + 1) * chunk
        return torch.cat(
            [
                self._causal_behind(part, key[:, : before + chunk], value[:, : before + chunk])
                for part, before in ((head, before_head), (tail, before_tail))
            ],
            dim=1,
        )

    def _causal_behind(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The last queries of a document. The ones before them are filled in, and dropped: a mask would cost memory
        with the square of the document."""
        before = key.shape[1] - query.shape[1]
        return self._causal(F.pad(query, (0, 0, before, 0)) if before else query, key, value)[:, before:]

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=self.softmax_scale
        )[0]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: attention has no parameters."""
        return {}
