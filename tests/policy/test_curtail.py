"""A pass that is cut short ends on every rank of every layout, and leaves nothing behind for the next one.

Not covered: GPUs, and that the time that is left is short (test_resume.py ends a run by it).
"""

from __future__ import annotations

import pytest
import torch
from layouts import Layout, build_policy, hf_weights, pack_for, rlsc, update
from torch import Tensor
from truth import one_update, truth, worst_update
from world import World

from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import Sample


def cut_and_update(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], after: int
) -> tuple[int, int, int, dict[str, Tensor]]:
    """A pass that is cut after so many micro-batches of each replica, and then a whole update.

    Returns this rank's micro-batches, how often it was asked, and the responses that were scored.
    """
    policy = build_policy(layout, shape, state)
    batch, asked = pack_for(policy, samples), 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    weigh = rlsc(0.1)
    scores = policy.forward_backward(batch, len(samples), weigh, abandoned=abandoned)
    scored = int((scores.lengths > 0).sum())
    policy.score(batch, len(samples), abandoned=lambda: True)
    update(policy, samples)
    return len(batch), asked, scored, hf_weights(policy)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2),
        Layout(pp=2, vpp=2),
        Layout(cp=2),
        Layout(dp=2),
        Layout(tp=2, pp=2),
        Layout(pp=2, dp=2, distributed_optimizer=True),
        Layout(pp=2, padded=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_pass_is_cut_on_every_rank_at_once(layout: Layout, after: int, world: World) -> None:
    expected = truth(False)
    arguments = (layout, expected.shape, expected.state, expected.batches["seven"], after)
    outcomes = world.run(layout.ranks, cut_and_update, *arguments)
    micro_batches = outcomes[0][0]
    assert micro_batches >= 2
    leaders = [asked for _, asked, _, _ in outcomes if asked]
    assert leaders == [after + 1] * layout.dp  # and nobody asks again when the answer was yes
    assert len({scored for _, _, scored, _ in outcomes}) == 1
    assert (outcomes[0][2] == 0) == (after == 0) and outcomes[0][2] < 7
    assert worst_update(outcomes[0][3], one_update(False), expected.state) < 1e-4


def test_a_pass_that_nobody_cuts_is_the_pass(world: World) -> None:
    """Asked before every micro-batch, and the same update comes out."""
    expected = truth(False)
    arguments = (Layout(pp=2), expected.shape, expected.state, expected.batches["seven"], 1000)
    micro_batches, asked, scored, weights = world.run(2, cut_and_update, *arguments)[0]
    assert asked == micro_batches and scored == 7
    torch.testing.assert_close(weights, one_update(False), rtol=1e-5, atol=1e-6)
