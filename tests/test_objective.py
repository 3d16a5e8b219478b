"""The loss against the paper's mathematics, on a policy small enough to enumerate every sequence.

Not covered: how the policy computes log p, and the mean over ranks. tests/policy holds both against HF and torch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from megatron_rlsc.config import ObjectiveConfig
from megatron_rlsc.objective import METHODS, Responses, group_advantages, log_weights, weigh, weight_shift

STOP, VOCAB, LIMIT = 2, 3, 3


def all_responses() -> list[tuple[int, ...]]:
    """Every response of a vocabulary {0, 1, stop}: up to the first stop token, or cut at LIMIT tokens.

    One of length 1, the stop token alone; 2 of length 2; of length 3, 4 that stop and 8 that are cut: 15.
    """
    stopped = [(*body, STOP) for length in range(LIMIT) for body in product((0, 1), repeat=length)]
    return stopped + list(product((0, 1), repeat=LIMIT))


RESPONSES = all_responses()


class TinyPolicy(torch.nn.Module):
    """p(token | previous token, position), from a two-layer network in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        size = (VOCAB + 1) * LIMIT  # the previous token, or none yet, at each position
        self.first = torch.nn.Parameter(torch.randn(size, 5, generator=generator, dtype=torch.float64))
        self.second = torch.nn.Parameter(torch.randn(5, VOCAB, generator=generator, dtype=torch.float64))

    def forward(self) -> Tensor:
        """[15] log p(y) of every response."""
        table = (self.first.tanh() @ self.second).log_softmax(-1)
        return torch.stack([self.logprob(table, response) for response in RESPONSES])

    @staticmethod
    def logprob(table: Tensor, response: tuple[int, ...]) -> Tensor:
        previous = (VOCAB, *response)
        rows = [position * (VOCAB + 1) + previous[position] for position in range(len(response))]
        return table[rows, list(response)].sum()


def gradient(policy: TinyPolicy, value: Tensor) -> Tensor:
    """[parameters] of a scalar."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(policy.parameters()))])


def response_losses(logprobs: Tensor, old_logprobs: Tensor, *, alpha: float, shift: float = 0.0) -> Tensor:
    """RLSC's, as the policy has them: -w log p."""
    old = responses(old_logprobs)
    return -weigh(ObjectiveConfig(alpha=alpha), old, shift=shift).to(logprobs.dtype) * logprobs


def responses(old_logprobs: Tensor, *, lengths: list[int] | None = None, groups: list[int] | None = None) -> Responses:
    count = len(old_logprobs)
    return Responses(
        logprobs=old_logprobs,
        lengths=torch.tensor(lengths or [1] * count),
        groups=torch.tensor(groups or [0] * count),
        advantages=torch.zeros(count),
    )


@pytest.fixture
def policy() -> TinyPolicy:
    return TinyPolicy()


def test_the_enumeration_is_complete(policy):
    assert len(set(RESPONSES)) == len(RESPONSES) == 15
    assert policy().exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_the_identity_that_the_loss_rests_on(policy):
    """grad sum_y p^2 = 2 E_{y ~ p}[p grad log p]: equation (*) of the module."""
    logprobs = policy()
    p = logprobs.exp().detach()
    expectation = gradient(policy, 2 * (p * (p * logprobs)).sum())
    torch.testing.assert_close(gradient(policy, (2 * policy()).exp().sum()), expectation, rtol=1e-12, atol=1e-15)
    assert expectation.norm() > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.1, 3.0])
def test_the_expected_gradient_is_minus_half_of_that_of_f(policy, alpha):
    """E_{y ~ p_old}[grad loss] = -1/2 grad F at theta = old, for L1, and for L2 whatever its alpha."""
    logprobs = policy()
    p = logprobs.exp().detach()
    ours = gradient(policy, (p * response_losses(logprobs, logprobs, alpha=alpha)).sum())
    confidence = gradient(policy, (2 * policy()).exp().sum())
    torch.testing.assert_close(ours, -confidence / 2, rtol=1e-11, atol=1e-14)


def test_the_sampled_gradient_converges_to_it(policy):
    """The mean over sampled responses, which is what the trainer takes, and not a sum over distinct ones.

    100 000 samples: the standard error of each component is below 0.5 / sqrt(100 000) = 0.0016.
    """
    logprobs = policy()
    samples = torch.multinomial(logprobs.exp().detach(), 100_000, True, generator=torch.Generator().manual_seed(1))
    ours = gradient(policy, response_losses(logprobs, logprobs, alpha=0.0)[samples].mean())
    confidence = gradient(policy, (2 * policy()).exp().sum())
    torch.testing.assert_close(ours, -confidence / 2, rtol=0, atol=5 * 0.0016)


def test_enumerating_without_probabilities_gives_nothing(policy):
    """sum_y grad L1 = -sum_y p grad log p = -grad sum_y p = -grad 1 = 0: why sum_y must be over *sampled* responses."""
    logprobs = policy()
    ours = gradient(policy, response_losses(logprobs, logprobs, alpha=0.0).sum())
    assert ours.abs().max() < 1e-15
    one_alone = gradient(policy, response_losses(policy(), logprobs, alpha=0.0)[0])
    assert one_alone.abs().max() > 1e-2  # the terms are not zero: they cancel


def test_numbers_by_hand():
    """p = 1/2 and 1/4, alpha 1/10.

    L1: -1/2 log 1/2 = 0.34657, -1/4 log 1/4 = 0.34657. L2: 0.6 x 0.69315 = 0.41589, 0.35 x 1.38629 = 0.48520.
    Gradients of log p are the weights: -0.6 and -0.35.
    """
    logprobs = torch.tensor([0.5, 0.25]).log().requires_grad_()
    assert response_losses(logprobs, logprobs, alpha=0.0).tolist() == pytest.approx([0.34657, 0.34657], abs=1e-5)
    losses = response_losses(logprobs, logprobs, alpha=0.1)
    assert losses.tolist() == pytest.approx([0.41589, 0.48520], abs=1e-5)
    losses.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.6, -0.35])


def test_numbers_by_hand_with_a_frozen_policy_and_a_shift():
    """p_old = 1/2 and 1/8, p = 1/4 and 1, alpha 1/4: weights 3/4 and 3/8, batch-max divides them by 3/4: 1 and 1/2.

    Losses: 1 x log 4 = 1.38629, 1/2 x log 1 = 0. Unscaled: 3/4 x log 4 = 1.03972.
    """
    logprobs, old_logprobs = torch.tensor([0.25, 1.0]).log(), torch.tensor([0.5, 0.125]).log()
    shift = weight_shift(old_logprobs, ObjectiveConfig(alpha=0.25, weight_scale="batch-max"))
    assert shift == pytest.approx(math.log(0.75))
    scaled = response_losses(logprobs, old_logprobs, alpha=0.25, shift=shift)
    assert scaled.tolist() == pytest.approx([1.38629, 0], abs=1e-5)
    assert weight_shift(old_logprobs, ObjectiveConfig(alpha=0.25, weight_scale="none")) == 0.0
    unscaled = response_losses(logprobs, old_logprobs, alpha=0.25)
    assert unscaled.tolist() == pytest.approx([1.03972, 0], abs=1e-5)


def test_the_old_policy_has_no_gradient():
    """Without the detach, d/dlogp of -p log p would be -p (1 + log p): -1/2 (1 - 0.693) = -0.153 in place of -1/2."""
    logprobs = torch.tensor([0.5], dtype=torch.float64).log().requires_grad_()
    response_losses(logprobs, logprobs, alpha=0.0).sum().backward()
    assert logprobs.grad.item() == pytest.approx(-0.5, abs=1e-15)


LONG = torch.tensor([-300.0, -301.0, -310.0], dtype=torch.float64)


def test_unscaled_l1_of_long_responses_is_exactly_zero_in_float32():
    """exp(-300) = 5e-131 is a float64, and no float32 (the smallest is 1.4e-45): every response weighs nothing."""
    logprobs = LONG.float().requires_grad_()
    losses = response_losses(logprobs, logprobs, alpha=0.0)
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and logprobs.grad.tolist() == [0, 0, 0]


def test_unscaled_l1_is_exactly_zero_in_float64_too():
    """exp(-800) is below the smallest float64, 4.9e-324 = exp(-744.4)."""
    logprobs = (LONG - 500).requires_grad_()
    response_losses(logprobs, logprobs, alpha=0.0).sum().backward()
    assert logprobs.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, -500.0, -100_000.0])
def test_batch_max_keeps_the_direction_at_any_length(dtype, offset):
    """Weights in proportion exp(0) : exp(-1) : exp(-10), the direction that float64 has in log space."""
    logprobs = (LONG + offset).to(dtype).requires_grad_()
    shift = weight_shift(logprobs, ObjectiveConfig(alpha=0.0, weight_scale="batch-max"))
    assert shift == -300 + offset
    response_losses(logprobs, logprobs, alpha=0.0, shift=shift).sum().backward()
    expected = -(LONG - LONG.logsumexp(0)).exp()  # of unit sum
    ours = logprobs.grad.double()
    torch.testing.assert_close(ours / ours.sum().abs(), expected, rtol=1e-6, atol=0)


def test_batch_max_is_the_true_direction_of_a_policy(policy):
    """Where nothing underflows, batch-max is the unscaled gradient times one constant, exp(-shift)."""
    logprobs = policy()
    shift = weight_shift(logprobs, ObjectiveConfig(alpha=0.0, weight_scale="batch-max"))
    plain = gradient(policy, response_losses(policy(), logprobs, alpha=0.0).mean())
    scaled = gradient(policy, response_losses(policy(), logprobs, alpha=0.0, shift=shift).mean())
    torch.testing.assert_close(scaled * math.exp(shift), plain, rtol=1e-12, atol=1e-16)
    assert shift == logprobs.max().item()


def test_l2_of_long_responses_weighs_them_by_alpha():
    """p_old is negligible beside alpha: every weight is alpha, and under batch-max 1."""
    assert log_weights(LONG, 0.1).exp().tolist() == pytest.approx([0.1, 0.1, 0.1], rel=1e-15)
    assert weight_shift(LONG, ObjectiveConfig(alpha=0.1, weight_scale="batch-max")) == pytest.approx(
        math.log(0.1), rel=1e-15
    )
    ones = response_losses(torch.ones(3), LONG.float(), alpha=0.1, shift=math.log(0.1))
    assert ones.tolist() == pytest.approx([-1, -1, -1])


def test_log_weights_are_float64_and_detached():
    logprobs = torch.tensor([-1.0], requires_grad=True)
    for alpha in (0.0, 0.1):
        weights = log_weights(logprobs, alpha)
        assert weights.dtype == torch.float64 and not weights.requires_grad
        assert weights.item() == pytest.approx(math.log(math.exp(-1) + alpha), rel=1e-12)


def test_every_objective_has_a_row_and_every_row_is_one():
    choices = get_args(get_type_hints(ObjectiveConfig)["objective"])
    assert choices == tuple(METHODS)


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_power_follows_the_gradient_of_its_functional(policy, power):
    """grad E_{y ~ p}[p^power] = (1 + power) E_{y ~ p}[p^power grad log p]."""
    config = ObjectiveConfig(objective="rlsc-power", power=power, alpha=0.1)
    logprobs = policy()
    weights = weigh(config, responses(logprobs))
    ours = gradient(policy, -(logprobs.exp().detach() * weights * logprobs).sum())
    functional = gradient(policy, ((1 + power) * policy()).exp().sum())
    torch.testing.assert_close(ours, -functional / (1 + power), rtol=1e-11, atol=1e-14)
    assert weight_shift(logprobs, replace(config, alpha=0, weight_scale="batch-max")) == power * logprobs.max().item()


def test_negative_entropy_follows_the_gradient_of_its_functional(policy):
    """grad sum_y p log p = E[(log p + 1) grad log p]: any constant beside log p has no gradient in expectation."""
    logprobs = policy()
    weights = weigh(ObjectiveConfig(objective="negative-entropy"), responses(logprobs))
    ours = gradient(policy, -(logprobs.exp().detach() * weights * logprobs).sum())
    functional = gradient(policy, (policy().exp() * policy()).sum())
    torch.testing.assert_close(ours, -functional, rtol=1e-11, atol=1e-14)


def test_the_other_weights_by_hand():
    """Two questions, p = 1/2, 1/8 and 1/4, 1/4, of 1, 3, 2 and 2 tokens; alpha 0.1.

    rlsc-length: 1/2, (1/8)^(1/3) = 1/2, (1/4)^(1/2) = 1/2 twice, each + 0.1.
    rlsc-group: means 5/16 and 1/4, so 1.6, 0.4, 1, 1, each + 0.1.
    negative-entropy: log 1/2 and log 1/8 around their mean log 1/4: log 2, -log 2; 0, 0.
    """
    four = responses(torch.tensor([0.5, 0.125, 0.25, 0.25]).log(), lengths=[1, 3, 2, 2], groups=[0, 0, 1, 1])
    expected = {
        "rlsc": [0.6, 0.225, 0.35, 0.35],
        "rlsc-length": [0.6, 0.6, 0.6, 0.6],
        "rlsc-group": [1.7, 0.5, 1.1, 1.1],
        "rlsc-power": [0.5**0.5 + 0.1, 0.125**0.5 + 0.1, 0.6, 0.6],
        "negative-entropy": [math.log(2), -math.log(2), 0, 0],
        "self-sft": [1, 1, 1, 1],
    }
    for name, weights in expected.items():
        assert weigh(ObjectiveConfig(objective=name), four).tolist() == pytest.approx(weights, abs=1e-7), name
    by_reward = [name for name, method in METHODS.items() if method.reward != "none"]
    assert {*expected, *by_reward} == set(METHODS)
    rewarded = replace(four, advantages=torch.tensor([1.0, -1.0, 0.0, 2.0]))
    for name in by_reward:
        assert weigh(ObjectiveConfig(objective=name), rewarded).tolist() == [1, -1, 0, 2]


def test_group_weights_are_exact_where_p_underflows():
    """exp(-900) is 0; e^0 and e^-1 of their sum, times 2."""
    weights = weigh(ObjectiveConfig(objective="rlsc-group", alpha=0), responses(torch.tensor([-900.0, -901.0])))
    assert weights.tolist() == pytest.approx([2 / (1 + math.exp(-1)), 2 / (1 + math.e)], rel=1e-6)


def test_advantages_by_hand():
    """1, 0, 0, 0: mean 1/4, std ((0.75^2 + 3 * 0.25^2) / 3)^0.5 = 0.5; 1, 1 and a lone 0: no spread."""
    found = group_advantages(torch.tensor([1.0, 1, 0, 0, 1, 0, 0]), torch.tensor([0, 1, 0, 0, 1, 0, 2]))
    assert found.tolist() == pytest.approx([1.5, 0, -0.5, -0.5, 0, -0.5, 0])
