"""The base in the policy's place: it scores as the base does, on every layout, and leaves no trace.

Not covered: GPUs, where the copy on the host is pinned, and bfloat16.
"""

from __future__ import annotations

import pytest
import torch
from layouts import Layout, build_policy, pack_for, update
from torch import Tensor
from truth import truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import ResponseScores, Sample


def swap_and_go_on(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], swaps: bool
) -> tuple[list[ResponseScores], dict[str, Tensor]]:
    """Two updates with or without the base's scores after each; this rank's own parameters in the end, padding rows
    and copies of a tied embedding included."""
    policy = build_policy(layout, shape, state)
    policy.keep_base()
    batch, said = pack_for(policy, samples), [policy.score(pack_for(policy, samples), len(samples))]
    for _ in range(2):
        update(policy, samples)
        if swaps:
            said.append(policy.score_base(batch, len(samples)))
    named = ((f"{i}.{name}", p) for i, chunk in enumerate(policy.chunks) for name, p in chunk.named_parameters())
    policy.score(batch, len(samples))  # parameters that are gathered late are whole then
    return said, {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        (Layout(), False),
        (Layout(tp=2, sequence_parallel=True), True),
        (Layout(pp=2, vpp=2), True),
        (Layout(dp=2, distributed_optimizer=True, overlap=True), False),
        (Layout(tp=2, pp=2, distributed_optimizer=True), True),
        (Layout(cp=2, dp=2), False),
    ],
    ids=str,
)
def test_the_base_takes_the_policys_place_and_gives_it_back(layout: Layout, tied: bool, world: World) -> None:
    """What the base says is what it said before it was trained; the policy is, to the last bit, the one whose training
    asked no base. On one layout and on another it says the same."""
    expected = truth(tied)
    samples = expected.batches["seven"]
    arguments = (layout, expected.shape, expected.state, samples)
    asked = world.run(layout.ranks, swap_and_go_on, *arguments, True)
    unasked = world.run(layout.ranks, swap_and_go_on, *arguments, False)
    for (said, parameters), (_, others) in zip(asked, unasked, strict=True):
        before, *after = said
        for scores in after:
            assert torch.equal(scores.logprobs, before.logprobs)
        assert all(torch.equal(tensor, others[name]) for name, tensor in parameters.items())
    alone = world.run(1, swap_and_go_on, Layout(), *arguments[1:], True)[0][0]
    torch.testing.assert_close(asked[0][0][1].logprobs, alone[1].logprobs, rtol=1e-5, atol=1e-5)


def start(layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], forgotten: int) -> Tensor:
    """One update at half the rate, of a policy that has made so many and forgotten them; this rank's parameters."""
    policy = build_policy(layout, shape, state)
    for _ in range(forgotten):
        update(policy, samples)
    policy.scale_rate(0.5)
    policy.forget_updates()
    policy.load_hf_weights(state.__getitem__)
    update(policy, samples)
    return torch.cat([p.detach().flatten() for chunk in policy.chunks for p in chunk.parameters()])


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, distributed_optimizer=True)], ids=str)
def test_updates_are_forgotten(layout: Layout, world: World) -> None:
    """Moments, the count of updates and the schedule: what follows is what a fresh policy would do."""
    expected = truth(False)
    arguments = (layout, expected.shape, expected.state, expected.batches["seven"])
    fresh, again = (world.run(layout.ranks, start, *arguments, forgotten) for forgotten in (0, 2))
    assert all(torch.equal(one, other) for one, other in zip(fresh, again, strict=True))
