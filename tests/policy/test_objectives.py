"""Every method of objective.py gives, in every kind of layout, the gradient that transformers and torch give.

Seven responses to two questions, their weights computed here in plain Python; packs and replicas cut through groups.
Not covered: other layouts (test_layouts.py has RLSC in all of them), and where rewards are from (test_rewards.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from statistics import fmean, stdev

import pytest
import reference
import torch
from layouts import Gradient, Layout, backward, build_policy, pack_for
from torch import Tensor
from truth import check_gradient, truth
from world import World

from megatron_rlsc.config import ObjectiveConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.learning import Weights
from megatron_rlsc.objective import METHODS
from megatron_rlsc.types import Sample

GROUPS = [0, 0, 0, 1, 1, 1, 1]
REWARDS = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
POWER, ALPHA = 0.05, 0.1  # responses of up to 30 tokens: p of them is 1e-30, p^0.05 is not
LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(cp=2),
    Layout(dp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True, overlap=True),
    Layout(dp=4),  # replicas with half a group
    Layout(dp=2, padded=True),
)


def seven() -> list[Sample]:
    samples = truth(False).batches["seven"]
    return [dataclasses.replace(sample, group=group) for sample, group in zip(samples, GROUPS, strict=True)]


def config(method: str) -> ObjectiveConfig:
    return ObjectiveConfig(objective=method, power=POWER, alpha=ALPHA)  # type: ignore[arg-type]


def expected_weights(method: str, logprobs: list[float], lengths: list[int]) -> list[float]:
    def of_siblings(values: list[float], i: int) -> list[float]:
        return [value for value, group in zip(values, GROUPS) if group == GROUPS[i]]

    def advantage(i: int) -> float:
        return (REWARDS[i] - fmean(of_siblings(REWARDS, i))) / stdev(of_siblings(REWARDS, i))

    p = [math.exp(value) for value in logprobs]
    formula = {
        "rlsc": lambda i: p[i] + ALPHA,
        "rlsc-length": lambda i: p[i] ** (1 / lengths[i]) + ALPHA,
        "rlsc-group": lambda i: p[i] / fmean(of_siblings(p, i)) + ALPHA,
        "rlsc-power": lambda i: p[i] ** POWER + ALPHA,
        "negative-entropy": lambda i: logprobs[i] - fmean(of_siblings(logprobs, i)),
        "self-sft": lambda i: 1.0,
    }.get(method, advantage)
    return [formula(i) for i in range(len(GROUPS))]


@functools.cache
def expected_gradient(method: str) -> dict[str, Tensor]:
    model = reference.tiny_qwen(tied=False)
    logprobs = reference.response_logprobs(model, seven(), temperature=0.5)
    lengths = [len(sample.response_token_ids) for sample in seven()]
    weights = torch.tensor(expected_weights(method, logprobs.double().tolist(), lengths))
    return reference.gradients(model, -(weights * logprobs).mean())


def differentiate(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample]
) -> dict[str, Gradient]:
    policy = build_policy(layout, shape, state)
    found = {}
    for name, method in METHODS.items():
        rewards = None if method.reward == "none" else torch.tensor(REWARDS)
        weights = Weights(config(name), samples, rewards)
        if weights.need_the_batch:
            old = policy.score(pack_for(policy, samples), len(samples))
            weights.fix(old.logprobs, old.lengths)
        found[name] = backward(policy, samples, weights, gather=not layout.distributed_optimizer)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_method_s_gradient_is_the_reference_s(layout: Layout, world: World) -> None:
    arguments = (layout, truth(False).shape, truth(False).state, seven())
    outcomes = world.run(layout.ranks, differentiate, *arguments)
    for name in METHODS:
        check_gradient([outcome[name] for outcome in outcomes], expected_gradient(name), layout)


def test_the_methods_differ() -> None:
    """So that one in another's place would not pass: no two gradients are parallel, but those of advantages."""
    names = [name for name, method in METHODS.items() if method.reward == "none"] + ["ttrl"]
    flat = {name: torch.cat([grad.flatten() for grad in expected_gradient(name).values()]) for name in names}
    for i, one in enumerate(names):
        for other in names[:i]:
            cosine = torch.cosine_similarity(flat[one], flat[other], dim=0)
            assert abs(cosine) < 0.9999, (one, other, cosine)
