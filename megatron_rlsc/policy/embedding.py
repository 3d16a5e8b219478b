"""The word embedding, whose gradient has the rows of a micro-batch's words and not those of the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_rlsc.policy.main_grad import in_main_grad


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Megatron's own, but for the way of its gradient; LanguageModelEmbedding takes no spec that could name it."""

    def forward(self, input_: Tensor) -> Tensor:
        """Ids [b, s] -> [b, s, h]; with `reduce_scatter_embeddings`, [s / TP, b, h]."""
        words = input_ - self.vocab_start_index
        held = (words >= 0) & (words < self.num_embeddings_per_partition)
        rows = _Rows.apply(self.weight, words.where(held, 0), held)
        if self.reduce_scatter_embeddings:
            rows = rows.transpose(0, 1).contiguous()
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, words: Tensor, held: Tensor) -> Tensor:
        """[..., h] rows of `weight`, zeros where they are another rank's."""
        ctx.save_for_backward(weight, words, held)
        return weight[words].masked_fill_(~held[..., None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, words, held = ctx.saved_tensors
        main_grad = getattr(weight, "main_grad", None)
        grad_weight = torch.zeros_like(weight) if main_grad is None else main_grad
        rows = grad.masked_fill(~held[..., None], 0).flatten(0, -2).to(grad_weight.dtype)
        # Each is deterministic where the other is not: on CUDA the one adds by atomics and the other sorts.
        if grad.is_cuda:
            grad_weight.index_put_((words.flatten(),), rows, accumulate=True)
        else:
            grad_weight.index_add_(0, words.flatten(), rows)
        if main_grad is None:
            return grad_weight, None, None
        in_main_grad(weight)
        return None, None, None
