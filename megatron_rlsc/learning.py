"""A step's updates: what each response weighs, the pass that learns from it, what must hold before a weight changes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlsc.config import Config, ObjectiveConfig
from megatron_rlsc.health import require_sound
from megatron_rlsc.interrupt import Interruption, Urgency
from megatron_rlsc.objective import METHODS, Responses, group_advantages, weigh, weight_shift
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.rewards import NoJudge
from megatron_rlsc.tracking import Timer
from megatron_rlsc.types import MicroBatch, ResponseScores, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """A step's updates."""

    scores: ResponseScores
    """The policy's before the first of them."""
    sampled: Tensor | None
    """[B] float64, with --rollout-lead: log p_old, by the sampler. Without, the policy is p_old: None."""
    weights: Tensor
    """[B] of the responses in the loss."""
    rewards: Tensor | None
    """[B], where the method takes one."""
    shift: float
    """Of the weights."""
    gradient_norm: float
    """Of the last update."""
    learning_rate: float
    """Likewise."""

    @property
    def old_logprobs(self) -> Tensor:
        """[B] float64, log p_old."""
        return self.scores.logprobs if self.sampled is None else self.sampled


def learn(
    config: Config,
    policy: Policy,
    samples: list[Sample],
    batch: list[MicroBatch],
    judge: NoJudge,
    stop: Interruption,
    step: int,
) -> Learned | None:
    """All updates of a step, or none: then the run is to end at once, and the result is None."""
    method, num_samples, updates = METHODS[config.objective.objective], len(samples), config.train.updates_per_rollout
    rewards = agree(judge.rewards(samples), policy.parallel) if method.reward != "none" else None
    weights = Weights(config.objective, samples, rewards)
    limit = config.rollout.difference_limit(bf16=config.model.bf16)

    def abandoned() -> bool:
        return stop.at_once

    sampled, max_difference = None, limit  # the sampler has these weights, and no later ones
    if config.rollout.rollout_lead:
        # p_old is of weights that the trainer has no more, but for the first step: the sampler alone knows it.
        sampled, lengths = sampled_logprobs(samples)
        weights.fix(sampled, lengths)
        if any(sample.made_after != step - 1 for sample in samples):
            max_difference = math.inf
    # The first update's own pass gives p_old: another is needed for those after it, and for what depends on the batch.
    elif updates > 1 or weights.need_the_batch:
        old = policy.score(batch, num_samples, abandoned=abandoned)
        weights.fix(old.logprobs, old.lengths)
    scores = policy.forward_backward(batch, num_samples, weights, abandoned=abandoned)
    if urgency(stop, policy.parallel) is Urgency.AT_ONCE:
        return None
    first = scores
    for update in range(updates):
        if update > 0:
            scores = policy.forward_backward(batch, num_samples, weights)
            max_difference = math.inf
        gradient_norm = policy.gradient_norm()
        require_sound(scores, gradient_norm, step=step, max_difference=max_difference)
        learning_rate = policy.step()
    return Learned(
        scores=first,
        sampled=sampled,
        weights=weights(first.logprobs, first.lengths, torch.arange(num_samples)),
        rewards=rewards,
        shift=weights.shift,
        gradient_norm=gradient_norm,
        learning_rate=learning_rate,
    )


def sampled_logprobs(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """[B] float64, the sampler's own log-probability of each response, at the sampling temperature; [B] its tokens."""
    logprobs = [math.fsum(sample.rollout_logprobs) for sample in samples]
    lengths = [len(sample.response_token_ids) for sample in samples]
    return torch.tensor(logprobs, dtype=torch.float64), torch.tensor(lengths)


def kl_to_base(
    policy: Policy, batch: list[MicroBatch], old_logprobs: Tensor, stop: Interruption, timer: Timer
) -> float | None:
    """E_{y ~ p_old}[log p_old(y) - log p_base(y)] over the step's responses, nats a response; `old_logprobs` [B] are
    log p_old. None where the run is to end at once."""
    with timer.phase("kl"):
        base = policy.score_base(batch, len(old_logprobs), abandoned=lambda: stop.at_once)
    cut = urgency(stop, policy.parallel) is Urgency.AT_ONCE
    return None if cut else float((old_logprobs - base.logprobs).mean())


class Weights:
    """What each response of a step weighs: known of the whole batch before a pass, or as a pass comes to it."""

    def __init__(self, objective: ObjectiveConfig, samples: Sequence[Sample], rewards: Tensor | None) -> None:
        """`rewards`: [B], where the method takes one."""
        self.need_the_batch = METHODS[objective.objective].siblings or objective.weight_scale != "none"
        """Before the first of them is known, `fix` must be called."""
        self.shift = 0.0
        """Of `weight_shift`."""
        self._objective = objective
        self._groups = torch.tensor([sample.group for sample in samples])
        self._advantages = torch.zeros(len(samples)) if rewards is None else group_advantages(rewards, self._groups)
        self._table: Tensor | None = None

    def fix(self, old_logprobs: Tensor, lengths: Tensor) -> None:
        """From here on they are those of log p_old, [B], and the responses' tokens, [B], whatever the policy says."""
        self.shift = weight_shift(old_logprobs, self._objective)
        self._table = self._weigh(old_logprobs, lengths, torch.arange(len(lengths)))

    def __call__(self, logprobs: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """[d] float64; `policy.Weigh`."""
        if self._table is not None:
            return self._table.to(rows.device)[rows]
        return self._weigh(logprobs, lengths, rows)

    def _weigh(self, logprobs: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        responses = Responses(
            logprobs=logprobs,
            lengths=lengths,
            groups=self._groups.to(rows.device)[rows],
            advantages=self._advantages.to(rows.device)[rows],
        )
        return weigh(self._objective, responses, shift=self.shift)


def urgency(stop: Interruption, parallel: Parallel) -> Urgency:
    """What any rank knows of, on every rank."""
    return Urgency(parallel.largest(stop.urgency())[0])


def agree(rewards: Sequence[float] | None, parallel: Parallel) -> Tensor:
    """[B] rank 0's rewards, on every rank."""
    data = parallel.broadcast_bytes(None if rewards is None else json.dumps(rewards).encode())
    return torch.tensor(json.loads(data), dtype=torch.float64)
