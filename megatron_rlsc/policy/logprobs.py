"""Log-probabilities and entropy of tokens, the vocabulary sharded over TP, one chunk's logits in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlsc.policy.main_grad import in_main_grad
from megatron_rlsc.ranges import span

ROWS = 32
"""Tokens whose probabilities are in memory at one time, beside a chunk's logits."""
WORDS = 16384
"""Words whose logits, or gradients, are in memory at one time in the weight's dtype, where that is a narrower one."""
FORESEEN_TO = 1e-2
"""The relative difference of a foreseen gradient: sums of log p in another order, exponentiated."""

Foresee = Callable[[Tensor, slice, slice], Tensor]
"""log p of a chunk of whole responses, [c], where it stands among all tokens, and the responses among all -> the
gradient, [c], that a backward pass will bring back to them."""


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_tokens: int,
    responses: Sequence[int] = (),
    foresee: Foresee | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[target], and the entropy of that softmax.

    The backward pass computes a chunk's logits again: four products, for three that are needed. Where a chunk holds
    whole responses, and what they weigh is known by their log p, their gradient is taken from the logits that are
    there: three. The gradient of `hidden` is all-reduced over the group, so `hidden` must be the same, and unsharded,
    on every rank of it.

    Args:
        hidden: [n, h]
        weight: [padded vocabulary / TP, h], this rank's rows; rows past `vocab_size` take no probability. Where it has
            Megatron's `main_grad`, its gradient is added there, and `grad_added_to_main_grad` set.
        targets: [n] int64
        temperature: divides the logits.
        vocab_size: tokens that exist.
        group: the TP ranks, in the order of their rows.
        chunk_tokens: tokens whose logits are in memory at one time.
        responses: tokens of each response, end to end; asked for by `foresee` alone.
        foresee: known beforehand, it saves a product. Heeded where there is a `main_grad` to add to.

    Returns:
        log-probabilities [n] float32, which carry the gradient, and entropies [n] float32, which do not; nats.

    Raises:
        RuntimeError: in the backward pass, which brings back another gradient than was foreseen.
    """
    first = group.rank() * weight.shape[0]
    present = min(max(vocab_size - first, 0), weight.shape[0])
    if foresee is None or not torch.is_grad_enabled() or not hasattr(weight, "main_grad"):
        responses, foresee = (len(targets),), None
    chunks = tuple(_chunks(responses, chunk_tokens))
    return _VocabParallelLogprobs.apply(
        hidden, weight, targets, _Shard(temperature, first, present, group), chunks, foresee
    )


@dataclass(frozen=True)
class _Shard:
    """What a rank has of the vocabulary."""

    temperature: float
    first: int
    present: int
    """Words from `first` on; the rows behind them are padding."""
    group: dist.ProcessGroup

    def space(self, chunks: Sequence[_Chunk], like: Tensor) -> Tensor:
        """[c, present] float32, for the logits of any of the chunks."""
        longest = max((chunk.tokens.stop - chunk.tokens.start for chunk in chunks), default=0)
        return like.new_empty(longest, self.present, dtype=torch.float32)

    def logits(self, hidden: Tensor, weight: Tensor, space: Tensor) -> Tensor:
        """[c, present] float32, tempered, where the last chunk's were."""
        logits, rows = space[: len(hidden)], weight[: self.present]
        if hidden.dtype == logits.dtype:
            torch.mm(hidden, rows.t(), out=logits)
        else:
            for columns, words in zip(logits.split(WORDS, dim=1), rows.split(WORDS)):
                columns.copy_(hidden @ words.t())
        return logits.div_(self.temperature)

    def own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[c] each: whether this rank's words hold the target, and its column, where they do."""
        columns = targets - self.first
        holds = (columns >= 0) & (columns < self.present)
        return holds, columns.where(holds, 0)

    def pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        """[c] the targets' logits, 0 for those of other ranks."""
        if not self.present:
            return logits.new_zeros(len(targets))
        holds, columns = self.own(targets)
        return logits.gather(1, columns[:, None])[:, 0].where(holds, 0.0)

    def gradients(
        self,
        weights: Tensor,
        share: Tensor | float,
        upstream: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        grad_weight: Tensor,
    ) -> Tensor:
        """[c, h] of `hidden`, this shard's part of it; the weight's is added to `grad_weight`.

        Args:
            weights: [c, present] of this shard's words; spent.
            share: [c] what turns them into probabilities.
            upstream: [c] gradient of the targets' log-probabilities.
        """
        # d log p_target / d logit_v = [v = target] - p_v
        scale = upstream / self.temperature
        grad_logits = weights.mul_((-scale * share)[:, None])
        if self.present:
            holds, columns = self.own(targets)
            grad_logits.scatter_add_(1, columns[:, None], scale.where(holds, 0.0)[:, None])
        return _products(grad_logits, hidden, weight[: self.present], grad_weight[: self.present])


@dataclass(frozen=True)
class _Chunk:
    tokens: slice
    responses: slice
    """Whose tokens it has; none where it has but a piece of one."""

    @property
    def whole(self) -> bool:
        return self.responses.stop > self.responses.start


def _chunks(responses: Sequence[int], limit: int) -> Iterator[_Chunk]:
    """Whole responses together where they fit the limit; a longer one in pieces of it."""
    start, first = 0, 0  # of the next chunk
    stop = 0
    for number, length in enumerate(responses):
        if stop > start and stop + length - start > limit:
            yield _Chunk(slice(start, stop), slice(first, number))
            start, first = stop, number
        stop += length
        if length > limit:
            for piece in range(start, stop, limit):
                yield _Chunk(slice(piece, min(piece + limit, stop)), slice(0, 0))
            start, first = stop, number + 1
    if stop > start:
        yield _Chunk(slice(start, stop), slice(first, len(responses)))


def _exponentiate(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns logits into exp(logit - peak) in place, few rows at a time: what it takes beside them is as much.

    Returns each row's peak, log of the sum of exp(logit), and entropy: [c] each, of one shard's softmax.
    """
    peak, lse, entropy = logits.new_zeros(3, len(logits))
    if not logits.shape[1]:  # padding alone
        return peak, lse.fill_(-torch.inf), entropy
    torch.amax(logits, -1, out=peak)
    spare = torch.empty_like(logits[:ROWS])
    for rows, top, to_lse, to_entropy in zip(*(part.split(ROWS) for part in (logits, peak, lse, entropy))):
        weights = torch.exp(rows.sub_(top[:, None]), out=spare[: len(rows)])
        total = weights.sum(-1)
        to_lse.copy_(top + total.log())
        to_entropy.copy_(total.log() - rows.mul_(weights).sum(-1) / total)  # of two that are not negative
        rows.copy_(weights)
    return peak, lse, entropy


def _products(grad_logits: Tensor, hidden: Tensor, weight: Tensor, grad_weight: Tensor) -> Tensor:
    """grad_logits @ weight, [c, h], and grad_weight += grad_logits.T @ hidden, [v, h], with no second [c, v] or [v, h]
    where the dtypes differ."""
    if weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), hidden)
        return grad_logits @ weight
    grad_hidden = torch.zeros_like(hidden, dtype=grad_logits.dtype)
    for columns, words, rows in zip(grad_logits.split(WORDS, dim=1), weight.split(WORDS), grad_weight.split(WORDS)):
        low = columns.to(weight.dtype)
        grad_hidden += low @ words
        if rows.dtype == low.dtype:
            rows.addmm_(low.t(), hidden)
        else:
            rows += low.t() @ hidden
    return grad_hidden.to(hidden.dtype)


def _over_shards(lse: Tensor, entropy: Tensor, target_logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """(lse, entropy, target's logit) of the whole vocabulary from those of each shard, [c] each."""
    # lse = log sum_r exp(lse_r); a shard's share of the probability is exp(lse_r - lse).
    peak = lse.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    share = (lse - peak).exp()
    sums = torch.stack([share, share * entropy - torch.xlogy(share, share), target_logits])
    dist.all_reduce(sums, group=group)
    # Entropy of the shares, and of what is within them: no difference of large numbers.
    return peak + sums[0].log(), sums[0].log() + sums[1] / sums[0], sums[2]


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    @span("logprobs")
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Any,
        targets: Tensor,
        shard: _Shard,
        chunks: tuple[_Chunk, ...],
        foresee: Foresee | None,
    ) -> tuple[Tensor, Tensor]:
        lse, logprobs, entropy, foreseen = (hidden.new_zeros(len(targets), dtype=torch.float32) for _ in range(4))
        grad_hidden = torch.zeros_like(hidden) if foresee else None
        space = shard.space(chunks, weight)
        for chunk in chunks:
            here = chunk.tokens
            logits = shard.logits(hidden[here], weight, space)
            target_logits = shard.pick(logits, targets[here])
            peak, own_lse, own_entropy = _exponentiate(logits)
            lse[here], entropy[here], target_logits = _over_shards(own_lse, own_entropy, target_logits, shard.group)
            logprobs[here] = target_logits - lse[here]
            if foresee and grad_hidden is not None and chunk.whole:
                foreseen[here] = foresee(logprobs[here], here, chunk.responses)
                share = (peak - lse[here]).exp()
                grad_hidden[here] = shard.gradients(
                    logits, share, foreseen[here], hidden[here], weight, targets[here], weight.main_grad
                )

        # Of what was foreseen the backward pass needs no hidden states, and of nothing else their gradient.
        whole = foresee is not None and all(chunk.whole for chunk in chunks)
        ctx.save_for_backward(None if whole else hidden, weight, targets, lse, foreseen, grad_hidden)
        ctx.shard, ctx.chunks = shard, chunks
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @span("logprobs-backward")
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, foreseen, grad_hidden = ctx.saved_tensors
        shard: _Shard = ctx.shard
        main_grad = getattr(weight, "main_grad", None)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if main_grad is None else main_grad
        known = grad_hidden is not None
        if grad_hidden is None:
            grad_hidden = torch.zeros_like(hidden)
        space = shard.space([chunk for chunk in ctx.chunks if not (known and chunk.whole)], weight)
        for chunk in ctx.chunks:
            here = chunk.tokens
            if known and chunk.whole:
                # NaN is for the checks before an update, which say where it comes from.
                agrees = torch.isclose(grad[here], foreseen[here], rtol=FORESEEN_TO, atol=0.0, equal_nan=True).all()
                torch._assert_async(agrees, "the gradient of the log-probabilities is not what was foreseen")
                continue
            p = shard.logits(hidden[here], weight, space).sub_(lse[here, None]).exp_()
            grad_hidden[here] = shard.gradients(p, 1.0, grad[here], hidden[here], weight, targets[here], grad_weight)
        dist.all_reduce(grad_hidden, group=shard.group)
        if main_grad is None:
            return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None
        in_main_grad(weight)
        return grad_hidden, None, None, None, None, None
