"""A step's figures, by hand; and what stops an update. Not covered: whether the scores are right (tests/policy)."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_rlsc.config import ObjectiveConfig
from megatron_rlsc.health import (
    distinct_answers,
    distinct_share,
    identical_share,
    measure_health,
    repeated_share,
    require_sound,
)
from megatron_rlsc.objective import log_weights
from megatron_rlsc.types import Health, ResponseScores, Sample


def sample(group: int, *tokens: int, finish_reason: str = "stop") -> Sample:
    return Sample(
        group=group,
        sample=0,
        prompt_index=group,
        prompt_token_ids=(1,),
        response_token_ids=tokens,
        rollout_logprobs=(0.0,) * len(tokens),
        finish_reason=finish_reason,  # type: ignore[arg-type]
        seed=0,
        version="v",
    )


def scores(*logprobs: float, difference: float = 0.0, length: int = 2) -> ResponseScores:
    return ResponseScores(
        logprobs=torch.tensor(logprobs, dtype=torch.float64),
        entropy=torch.full((len(logprobs),), 0.5, dtype=torch.float64),
        lengths=torch.full((len(logprobs),), length),
        rollout_difference=torch.full((len(logprobs),), difference, dtype=torch.float64),
    )


def test_by_hand():
    samples = [sample(0, 5, 9), sample(0, 5, 9), sample(1, 6, 9), sample(1, 7, 8, finish_reason="length")]
    p = (0.5, 0.5, 0.2, 0.0001)
    weights = torch.tensor([0.6, 0.6, 0.3, 0.1001], dtype=torch.float64)  # p + alpha
    health = measure_health(samples, scores(*map(math.log, p), difference=2e-5), weights, ObjectiveConfig(alpha=0.1))
    assert health.loss == pytest.approx(
        -(2 * 0.6 * math.log(0.5) + 0.3 * math.log(0.2) + 0.1001 * math.log(0.0001)) / 4
    )
    assert health.confidence == pytest.approx((0.5 + 0.5 + 0.2 + 0.0001) / 4)
    assert health.log_confidence == pytest.approx(math.log(1.2001 / 4))
    assert health.identical_share == 0.5  # the pair of group 0, not that of group 1
    assert health.identical_error == pytest.approx(0.5)  # of 1 and 0
    assert health.token_probability == pytest.approx((0.5 * 0.5 * 0.2 * 0.0001) ** (1 / 8))
    assert health.negligible_share == 0.25  # 0.0001 < 0.1 / 100
    assert health.effective_samples == pytest.approx(1.6001**2 / (0.36 + 0.36 + 0.09 + 0.1001**2))
    assert not health.weightless
    assert health.token_entropy == 0.25  # 4 * 0.5 nats over 8 tokens
    assert (health.response_length, health.truncated_share, health.logprob_difference) == (2.0, 0.25, 2e-5)
    assert health.repeated_share == 0.0  # no response has 8 tokens
    assert health.distinct_share == 0.75  # 1 of 2, and 2 of 2
    assert health.distinct_answers == 1.0  # 5 9, and 6 9 or 7 8


def test_p_old_of_weights_that_the_policy_has_left_behind():
    """Confidence is what the sampler says; the loss is of the policy that learns, which makes the responses e^0.5 and
    e^-0.1 times as probable: the mean of 0.5 and -0.1."""
    samples = [sample(0, 5, 9), sample(0, 6, 9)]
    sampled = torch.tensor([math.log(0.5), math.log(0.0001)], dtype=torch.float64)
    weights = sampled.exp() + 0.1
    now = scores(math.log(0.5) + 0.5, math.log(0.0001) - 0.1)
    health = measure_health(samples, now, weights, ObjectiveConfig(alpha=0.1), sampled=sampled)
    assert health.log_ratio == pytest.approx(0.2)
    assert health.confidence == pytest.approx(0.5001 / 2)
    assert health.log_confidence == pytest.approx(math.log(0.5001 / 2))
    assert health.token_probability == pytest.approx((0.5 * 0.0001) ** (1 / 4))
    assert health.negligible_share == 0.5
    assert health.loss == pytest.approx(-(0.6 * (math.log(0.5) + 0.5) + 0.1001 * (math.log(0.0001) - 0.1)) / 2)
    assert measure_health(samples, now, weights, ObjectiveConfig()).log_ratio is None


def test_identical_share_counts_ordered_pairs_within_groups():
    """a a a b: 6 of 12; c: no pair; a alone in another group is no sibling of the others."""
    group = [sample(0, 1), sample(0, 1), sample(0, 1), sample(0, 2), sample(1, 1)]
    assert identical_share(group) == 0.5
    assert identical_share([sample(0, 1)]) == 0.0


def test_a_response_that_repeats_itself():
    """12 equal tokens have 12 - 7 = 5 runs of 8, and 4 of them repeat the first. 9 different ones have 2 runs. A period
    of 3 over 16 tokens: 9 runs, 3 of them different. Together 4 + 0 + 6 of 5 + 2 + 9."""
    loop, prose, period = (7,) * 12, tuple(range(9)), (1, 2, 3) * 5 + (1,)
    assert repeated_share([sample(0, *loop)]) == 4 / 5
    assert repeated_share([sample(0, *loop), sample(1, *prose), sample(2, *period)]) == 10 / 16
    assert repeated_share([sample(0, 1, 1, 1)]) == 0.0


def test_different_responses_and_different_answers():
    """Groups a a b, a a c and d d d: 2 / 3, 2 / 3 and 1 / 3 of the siblings differ; the answers are a, a and d. What is
    before the last 16 tokens is no answer."""
    a, b, c, d = ((token, *range(100, 116)) for token in (1, 2, 3, 4))
    groups = ((1,), (1,), (2,)), ((1,), (1,), (3,)), ((4,), (4,), (4,))
    samples = [sample(group, *tokens) for group, siblings in enumerate(groups) for tokens in siblings]
    assert distinct_share(samples) == pytest.approx(5 / 9)
    assert distinct_answers(samples) == pytest.approx(2 / 3)
    assert distinct_answers(samples[::-1]) == pytest.approx(2 / 3)
    same_end = [sample(group, *tokens) for group, tokens in enumerate((a, b, c, d))]
    assert distinct_share(same_end) == 1.0
    assert distinct_answers(same_end) == 0.25


def test_long_responses_keep_their_figures_in_log_space():
    """exp(-900) is 0: F is read from its logarithm, and L1 without a shift says that it learns nothing."""
    samples = [sample(0, 1, 2), sample(0, 3, 4)]
    long = scores(-900.0, -901.0)

    def health(alpha: float, shift: float) -> Health:
        weights = (log_weights(long.logprobs, alpha) - shift).exp()
        return measure_health(samples, long, weights, ObjectiveConfig(alpha=alpha))

    unscaled = health(0.0, 0.0)
    assert (unscaled.confidence, unscaled.loss, unscaled.weightless) == (0.0, 0.0, True)
    assert unscaled.log_confidence == pytest.approx(-900 + math.log((1 + math.exp(-1)) / 2))
    assert unscaled.effective_samples == 0
    assert unscaled.negligible_share == 0.0  # there is no alpha to be beside
    scaled = health(0.0, -900.0)
    assert not scaled.weightless
    assert scaled.loss == pytest.approx((900 + 901 * math.exp(-1)) / 2)
    assert scaled.effective_samples == pytest.approx((1 + math.exp(-1)) ** 2 / (1 + math.exp(-2)))
    smoothed = health(0.1, 0.0)
    assert (smoothed.negligible_share, smoothed.weightless) == (1.0, False)


def test_advantages_cancel_in_no_figure():
    """Weights 1.5, -0.5, -0.5, -0.5: (sum |w|)^2 / sum w^2 = 9 / 3; the mean reward of 1, 0, 0, 0 is a quarter."""
    samples = [sample(0, 5, 9) for _ in range(4)]
    weights = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    method = ObjectiveConfig(objective="ttrl")
    health = measure_health(samples, scores(-1.0, -2.0, -2.0, -4.0), weights, method, rewards)
    assert health.loss == pytest.approx(-(1.5 * -1 + 0.5 * 8) / 4)
    assert health.effective_samples == pytest.approx(3)
    assert (health.reward, health.negligible_share) == (0.25, 0)
    assert not health.weightless
    assert measure_health(samples, scores(*[-1.0] * 4), 0 * weights, method, rewards).weightless


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_what_is_not_finite_stops_the_update(bad):
    with pytest.raises(ValueError, match="step 3: 1 of 2 responses have a log-probability that is not finite"):
        require_sound(scores(-1.0, bad), 1.0, step=3, max_difference=1e-3)
    with pytest.raises(ValueError, match=f"gradient norm is {bad}"):
        require_sound(scores(-1.0, -2.0), bad, step=3, max_difference=1e-3)


def test_a_sampler_that_lags_stops_the_update():
    require_sound(scores(-1.0, difference=9e-4), 1.0, step=1, max_difference=1e-3)
    with pytest.raises(ValueError, match=r"differs from the trainer's by 0\.31, the limit is 0\.001"):
        require_sound(scores(-1.0, difference=0.31), 1.0, step=1, max_difference=1e-3)
