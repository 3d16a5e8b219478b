"""Is the run well? Figures of a step that need no label, from what was sampled and what the policy says of it."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlsc.config import ObjectiveConfig
from megatron_rlsc.types import Health, ResponseScores, Sample

NEGLIGIBLE = 0.01
"""p_old counts as negligible beside alpha below this share of it."""
RUN_TOKENS = 8
"""Of the runs of tokens whose repetition is counted: long enough to be rare in prose and in a derivation."""
ANSWER_TOKENS = 16
"""Of a response's end, the stop token included, that stand for its answer: no text is read, no tokenizer needed."""


def measure_health(
    samples: Sequence[Sample],
    scores: ResponseScores,
    weights: Tensor,
    objective: ObjectiveConfig,
    rewards: Tensor | None = None,
    sampled: Tensor | None = None,
) -> Health:
    """The step's figures.

    Args:
        scores: of the policy that learns, in the order of `samples`.
        weights: [B] float64, of the responses in the loss.
        rewards: [B], where the method takes one.
        sampled: [B] float64, log p_old, where that policy is not p_old.
    """
    logprobs, tokens = scores.logprobs if sampled is None else sampled, int(scores.lengths.sum())
    relative = weights / weights.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return Health(
        loss=-float((weights * scores.logprobs).mean()),
        confidence=float(logprobs.exp().mean()),
        log_confidence=float(logprobs.logsumexp(0)) - math.log(len(samples)),
        identical_share=identical_share(samples),
        identical_error=identical_error(samples),
        token_probability=math.exp(float(logprobs.sum()) / tokens),
        negligible_share=_negligible_share(logprobs, objective),
        effective_samples=float(relative.abs().sum() ** 2 / (relative**2).sum()) if relative.any() else 0.0,
        weightless=bool((weights.float() == 0).all()),
        token_entropy=float(scores.entropy.sum()) / tokens,
        response_length=tokens / len(samples),
        truncated_share=sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        repeated_share=repeated_share(samples),
        distinct_share=distinct_share(samples),
        distinct_answers=distinct_answers(samples),
        logprob_difference=float(scores.rollout_difference.max()),
        log_ratio=None if sampled is None else float((scores.logprobs - sampled).mean()),
        reward=None if rewards is None else float(rewards.mean()),
    )


def _negligible_share(logprobs: Tensor, objective: ObjectiveConfig) -> float:
    if objective.objective != "rlsc" or objective.alpha == 0:
        return 0.0
    return float((logprobs < math.log(NEGLIGIBLE * objective.alpha)).double().mean())


def identical_share(samples: Sequence[Sample]) -> float:
    """The share of equal ordered pairs of siblings, over all groups: an estimate of F by counting.

    A group of 4 responses a, a, a, b has 3 * 2 equal ordered pairs of 4 * 3: 0.5.
    """
    equal = pairs = 0
    groups = Counter(sample.group for sample in samples)
    for count in Counter((sample.group, sample.response_token_ids) for sample in samples).values():
        equal += count * (count - 1)
    for size in groups.values():
        pairs += size * (size - 1)
    return equal / pairs if pairs else 0.0


def identical_error(samples: Sequence[Sample]) -> float:
    """The standard error of the mean over groups of their shares of equal pairs.

    Shares of 1 and 0 in two groups: deviations of one half, a variance of 2 / 4 over 2 - 1, and sqrt(1/2 / 2) = 0.5.
    """
    siblings = Counter(sample.group for sample in samples)
    equal = dict.fromkeys(siblings, 0)
    for (group, _), count in Counter((sample.group, sample.response_token_ids) for sample in samples).items():
        equal[group] += count * (count - 1)
    shares = [equal[group] / (size * (size - 1)) for group, size in siblings.items() if size > 1]
    return statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0


def repeated_share(samples: Sequence[Sample]) -> float:
    """The share of runs of RUN_TOKENS tokens that the same response has had before, over all responses' runs.

    A response of one token, n times, has n - 7 runs, of which all but one repeat.
    """
    repeated = runs = 0
    for sample in samples:
        tokens = sample.response_token_ids
        found = [tokens[i : i + RUN_TOKENS] for i in range(len(tokens) - RUN_TOKENS + 1)]
        repeated += len(found) - len(set(found))
        runs += len(found)
    return repeated / runs if runs else 0.0


def distinct_share(samples: Sequence[Sample]) -> float:
    """The mean over groups of different responses / siblings: 1 where all differ, 1 / siblings where all are equal."""
    siblings = Counter(sample.group for sample in samples)
    different = Counter(group for group, _ in {(sample.group, sample.response_token_ids) for sample in samples})
    return sum(different[group] / siblings[group] for group in siblings) / len(siblings)


def distinct_answers(samples: Sequence[Sample]) -> float:
    """Different answers / groups. A group's answer is the end, ANSWER_TOKENS long, that most of its responses have.

    Groups a a b, a a c and d d d have the answers a, a and d: 2 / 3.
    """
    ends: dict[int, Counter[tuple[int, ...]]] = {}
    for sample in samples:
        ends.setdefault(sample.group, Counter())[sample.response_token_ids[-ANSWER_TOKENS:]] += 1
    # Of ends equally frequent the smallest, so that the order of the samples does not matter.
    answers = {min(counts, key=lambda end: (-counts[end], end)) for counts in ends.values()}
    return len(answers) / len(ends)


class ProbeLimit:
    """How far a replica's log-probabilities of a fixed prompt may be from the trainer's after a push.

    The first push has the dtype's limit, and each one after that a fraction of it, or several times what the first one
    differed by. It finds weights that are wrong, not a step of BF16 that went missing: versions and checksums do that.
    """

    MARGIN = 8.0
    """Times the first difference."""
    SHARE = 0.25
    """Of the dtype's limit, which is allowed to every push."""

    def __init__(self, limit: float) -> None:
        """
        Args:
            limit: nats, of the worst token (`RolloutConfig.difference_limit`).
        """
        self._limit = limit
        self._baseline: float | None = None

    @property
    def nats(self) -> float:
        """Of the next push."""
        if self._baseline is None:
            return self._limit
        return min(self._limit, max(self.SHARE * self._limit, self.MARGIN * self._baseline))

    def require(self, differences: Sequence[float], *, version: str) -> float:
        """Returns the largest of the replicas' differences. Raises ValueError where it is above the limit, or not a
        number."""
        worst = max(differences, key=lambda value: math.inf if math.isnan(value) else value)
        if not worst <= self.nats:
            raise ValueError(
                f"push {version} went through, but of {len(differences)} replicas the worst gives a token of a fixed "
                f"prompt a log-probability that is {worst:.2g} from the trainer's; the limit is {self.nats:.2g}, of "
                f"--max-logprob-difference and the first push. The weights that it serves are not those that are "
                f"trained: no more responses were asked for"
            )
        self._baseline = worst if self._baseline is None else self._baseline
        return worst


def require_sound(scores: ResponseScores, gradient_norm: float, *, step: int, max_difference: float) -> None:
    """Raises ValueError, before anything is learned, where a step's figures cannot be trusted.

    That is: a log-probability or gradient is not finite, or the sampler's log-probabilities are not the policy's, which
    means that the sampler does not hold the weights that are trained.
    """
    finite = torch.isfinite(scores.logprobs)
    if not finite.all() or not math.isfinite(gradient_norm):
        raise ValueError(
            f"step {step}: {int((~finite).sum())} of {len(finite)} responses have a log-probability that is not "
            f"finite, and the gradient norm is {gradient_norm}; this update was not made. Lower --lr, or go on from an "
            f"earlier checkpoint; the step's rollouts are in the journal"
        )
    worst = float(scores.rollout_difference.max())
    if worst > max_difference:
        raise ValueError(
            f"step {step}: the sampler's log-probability of a token differs from the trainer's by {worst:.2g}, the "
            f"limit is {max_difference:.2g} (--max-logprob-difference): these responses are not from the policy that "
            f"is trained, its weights did not reach the sampler. No weight was changed"
        )
