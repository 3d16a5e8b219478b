"""The temperature reaches every log-probability: dropped anywhere, these fail.

Not covered: that the sampler samples at it (tests/rollout), and temperatures at which float32 overflows.
"""

from __future__ import annotations

import pytest
import reference
import torch
from layouts import Layout, backward, build_policy, pack_for, rlsc
from torch import Tensor
from truth import truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import ResponseScores, Sample

TEMPERATURES = (0.5, 1.0, 2.0)


def score_and_differentiate(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], temperature: float
) -> tuple[ResponseScores, ResponseScores, float]:
    policy = build_policy(layout, shape, state, temperature=temperature)
    scores = policy.score(pack_for(policy, samples), len(samples))
    gradient = backward(policy, samples, rlsc(0.1), gather=False)
    return scores, gradient.scores, gradient.norm


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_probabilities_and_gradient_follow_the_temperature(
    temperature: float, layout: Layout, world: World
) -> None:
    expected = truth(False)
    samples = expected.batches["seven"]
    model = reference.tiny_qwen(tied=False)
    at = {t: reference.response_logprobs(model, samples, temperature=t) for t in TEMPERATURES}
    norm = {
        t: reference.norm(reference.gradients(model, reference.rlsc_loss(logprobs, logprobs, alpha=0.1)))
        for t, logprobs in at.items()
    }
    arguments = (layout, expected.shape, expected.state, samples, temperature)
    scores, with_gradient, found_norm = world.run(2, score_and_differentiate, *arguments)[0]
    for t in TEMPERATURES:
        for logprobs in (scores.logprobs, with_gradient.logprobs):
            difference = (logprobs - at[t].detach()).abs()
            if t == temperature:
                torch.testing.assert_close(logprobs.float(), at[t].detach(), rtol=1e-5, atol=0)
                assert found_norm == pytest.approx(norm[t], rel=1e-5)
            else:
                assert difference.min() > 0.1, "nats, of the sum over a response"
                assert abs(found_norm / norm[t] - 1) > 0.01
