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
    """p_old's, of the policy that the sampler has."""
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

    # The first update's own pass gives p_old: another is needed for those after it, and for what depends on the batch.
    if updates > 1 or weights.need_the_batch:
        weights.fix(policy.score(batch, num_samples, abandoned=abandoned))
    scores = policy.forward_backward(batch, num_samples, weights, abandoned=abandoned)
    if urgency(stop, policy.parallel) is Urgency.AT_ONCE:
        return None
    first, max_difference = scores, limit  # the sampler has these weights, and no later ones
    for update in range(updates):
        if update > 0:
            scores = policy.forward_backward(batch, num_samples, weights)
            max_difference = math.inf
        gradient_norm = policy.gradient_norm()
        require_sound(scores, gradient_norm, step=step, max_difference=max_difference)
        learning_rate = policy.step()
    return Learned(
        scores=first,
        weights=weights(first.logprobs, first.lengths, torch.arange(num_samples)),
        rewards=rewards,
        shift=weights.shift,
        gradient_norm=gradient_norm,
        learning_rate=learning_rate,
    )


def kl_to_base(
    policy: Policy, batch: list[MicroBatch], scores: ResponseScores, stop: Interruption, timer: Timer
) -> float | None:
    """E_{y ~ p_old}[log p_old(y) - log p_base(y)] over the step's responses, nats a response; `scores` are p_old's.
    None where the run is to end at once."""
    with timer.phase("kl"):
        base = policy.score_base(batch, len(scores.logprobs), abandoned=lambda: stop.at_once)
    cut = urgency(stop, policy.parallel) is Urgency.AT_ONCE
    return None if cut else float((scores.logprobs - base.logprobs).mean())


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

    def fix(self, old: ResponseScores) -> None:
        """From here on they are those of `old`, p_old's scores, whatever the policy says."""
        self.shift = weight_shift(old.logprobs, self._objective)
        self._table = self._weigh(old.logprobs, old.lengths, torch.arange(len(old.lengths)))

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
