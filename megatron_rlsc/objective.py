"""What is learned: each method is a weight on log p_theta of the policy's own samples. Pure tensors: no rank, no model.

    L(theta) = - mean_i  w_i log p_theta(y_i|x_i)        y_i ~ p_old,  w_i a constant

`METHODS` has them all, with their weights and sources. The rest of this text derives RLSC's (arXiv 2506.06395,
equations 2 to 5).

Derivation. A policy is confident when two draws agree:

    F(theta) = E_{y ~ p_theta}[p_theta(y|x)] = sum_y p_theta(y|x)^2

    grad F   = 2 sum_y p_theta grad p_theta = 2 sum_y p_theta^2 grad log p_theta
             = 2 E_{y ~ p_theta}[p_theta(y|x) grad log p_theta(y|x)]                       (*)

The last line is an expectation over the policy's own samples. Freeze the sampler, p_old = p_theta at the time of
sampling, and (*) is -2 times the gradient of the mean over samples y_1 .. y_B ~ p_old of

    L1 = -  p_old(y_i|x)          log p_theta(y_i|x)
    L2 = - (p_old(y_i|x) + alpha) log p_theta(y_i|x)

so that E[grad L1] = -1/2 grad F at theta = old: the factor 2 goes into the learning rate. The paper's sum_y runs over
the *sampled* responses. Enumerating all y without the probabilities gives another gradient: that of L1 would be
-sum_y p grad log p = -grad sum_y p = 0.

alpha adds -alpha E_{p_old}[grad log p_theta], which is zero in expectation at theta = old (the score function has mean
zero): it is no smoothing of the direction but self-imitation noise of the drawn samples, which keeps a step from
vanishing when p_old underflows, and beyond the first update on a batch it holds p_theta near p_old.

Any increasing functional L of p sharpens the mode likewise: grad E_{y ~ p}[L(p)] = E_{y ~ p}[(L + p L') grad log p].
L = p is RLSC, L = p^power weighs by p^power, and L = log p, the negative entropy, by log p + 1.

log p(y|x) is the sum over response tokens, the first stop token included, at the sampling temperature, since that is
the distribution that the responses come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_rlsc.config import ObjectiveConfig

RewardKind = Literal["none", "majority", "label", "coin"]
"""Where a reward is from: the answer that most siblings give, the problem's own, or chance (rewards.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Responses:
    """What a weight may depend on: d responses, of the global batch or of a part of it."""

    logprobs: Tensor
    """[d] log p_old(y|x), nats."""
    lengths: Tensor
    """[d] response tokens, the stop token included."""
    groups: Tensor
    """[d] int64 from 0, the same for siblings: responses to one prompt."""
    advantages: Tensor
    """[d] `group_advantages` of the rewards; 0 where the method takes none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A row of the table."""

    weigh: Callable[[Responses, ObjectiveConfig, float], Tensor]
    """(responses, constants, shift) -> [d] float64, the weights."""
    equation: str
    """w(y), where p is p_old(y|x), of n tokens, and A the group advantage of reward r."""
    source: str
    siblings: bool = False
    """The weight of a response depends on p_old of its siblings: on the whole group, before any gradient."""
    reward: RewardKind = "none"


def log_weights(old_logprobs: Tensor, alpha: float) -> Tensor:
    """log(p_old + alpha) of each response, in float64: exact where exp(log p_old) underflows and alpha is 0.

    Args:
        old_logprobs: [B] log p_old(y|x), nats.
        alpha: the smoothing constant of L2; 0 gives L1.
    """
    old_logprobs = old_logprobs.detach().double()
    if alpha == 0:
        return old_logprobs
    return torch.logaddexp(old_logprobs, torch.full_like(old_logprobs, math.log(alpha)))


def weight_shift(old_logprobs: Tensor, config: ObjectiveConfig) -> float:
    """The shift s, one for the global batch, in the weights exp(log(p_old + alpha) - s).

    `none` is the paper: s = 0. `batch-max` takes the largest log(p_old + alpha), so that the largest weight is 1: the
    loss is divided by one constant, its direction is exact at any response length.
    """
    if config.weight_scale == "none":
        return 0.0
    return log_weights(_exponent(config) * old_logprobs, config.alpha).max().item()


def weigh(config: ObjectiveConfig, responses: Responses, *, shift: float = 0.0) -> Tensor:
    """[d] float64, without a gradient: what --objective multiplies each -log p_theta with.

    Args:
        config: the method and its constants.
        responses: the whole global batch for a method with `siblings`, any part of it for another one.
        shift: from `weight_shift`, over the global batch.
    """
    return METHODS[config.objective].weigh(responses, config, shift).detach()


def group_advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """(r - mean) / std over each response's siblings, and 0 where they all have one reward (GRPO, arXiv 2402.03300,
    section 4.1.2, of outcomes; std with n - 1).

    Args:
        rewards: [B]
        groups: [B] int64 from 0.
    """
    rewards = rewards.double()
    centred = rewards - _group_mean(rewards, groups)
    size = torch.bincount(groups).double()[groups]
    variance = _group_mean(centred**2, groups) * size / (size - 1).clamp(min=1)
    return torch.where(variance > 0, centred / variance.clamp(min=torch.finfo(torch.float64).tiny).sqrt(), 0.0)


def _group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """[B] the mean over each response's siblings."""
    counts = torch.bincount(groups)
    sums = values.new_zeros(len(counts)).index_add(0, groups, values)
    return (sums / counts)[groups]


def _group_logsumexp(values: Tensor, groups: Tensor) -> Tensor:
    """[B] log sum exp over each response's siblings."""
    peak = values.new_full((int(groups.max()) + 1,), -math.inf).scatter_reduce(0, groups, values, "amax")[groups]
    return peak + (_group_mean((values - peak).exp(), groups) * torch.bincount(groups)[groups]).log()


def _exponent(config: ObjectiveConfig) -> float:
    return config.power if config.objective == "rlsc-power" else 1.0


def _confidence(responses: Responses, config: ObjectiveConfig, shift: float) -> Tensor:
    return (log_weights(_exponent(config) * responses.logprobs, config.alpha) - shift).exp()


def _length(responses: Responses, config: ObjectiveConfig, shift: float) -> Tensor:
    return log_weights(responses.logprobs / responses.lengths.clamp(min=1), config.alpha).exp()


def _group(responses: Responses, config: ObjectiveConfig, shift: float) -> Tensor:
    logprobs = responses.logprobs.detach().double()
    size = torch.bincount(responses.groups)[responses.groups]
    return size * (logprobs - _group_logsumexp(logprobs, responses.groups)).exp() + config.alpha


def _negative_entropy(responses: Responses, config: ObjectiveConfig, shift: float) -> Tensor:
    logprobs = responses.logprobs.detach().double()
    return logprobs - _group_mean(logprobs, responses.groups)


def _ones(responses: Responses, config: ObjectiveConfig, shift: float) -> Tensor:
    return torch.ones_like(responses.logprobs, dtype=torch.float64)


def _advantages(responses: Responses, config: ObjectiveConfig, shift: float) -> Tensor:
    return responses.advantages.double()


METHODS: Mapping[str, Method] = {
    "rlsc": Method(weigh=_confidence, equation="p + alpha", source="RLSC, arXiv 2506.06395, L1 (alpha 0) and L2"),
    "rlsc-length": Method(weigh=_length, equation="p^(1/n) + alpha", source="RLSC on the mean token probability"),
    "rlsc-group": Method(
        weigh=_group,
        equation="p / mean of the siblings' p, + alpha",
        source="RLSC, each question with the same weight",
        siblings=True,
    ),
    "rlsc-power": Method(
        weigh=_confidence, equation="p^power + alpha", source="RLSC's general functional, L(p) = p^power"
    ),
    "negative-entropy": Method(
        weigh=_negative_entropy,
        equation="log p - mean of the siblings' log p",
        source="L(p) = log p; EM-RL, arXiv 2505.15134, of sequences",
        siblings=True,
    ),
    "ttrl": Method(
        weigh=_advantages,
        equation="A, r = 1 for the answer of most siblings",
        source="TTRL, arXiv 2504.16084, with GRPO's advantage",
        reward="majority",
    ),
    "self-sft": Method(weigh=_ones, equation="1", source="control: fine-tuning on one's own samples"),
    "random": Method(
        weigh=_advantages,
        equation="A, r = 1 with chance 1/2",
        source="control: spurious rewards, arXiv 2506.10947",
        reward="coin",
    ),
    "verified": Method(
        weigh=_advantages,
        equation="A, r = 1 for the right answer",
        source="ceiling: RLVR with labels, by GRPO's advantage",
        reward="label",
    ),
}
"""{--objective: its weight}. In expectation over p_old a constant weight has no gradient at theta = old."""
