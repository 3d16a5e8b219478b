"""Every layout gives the log-probabilities, loss, gradient and weights of plain transformers and torch.

Four batches of 1, 3, 7 and 7 responses of very uneven length, packed into several micro-batches, the last with prompts
that siblings share; a vocabulary of 259, padded to 384 or 512 rows; those beyond it set to 50 in embedding and output
layer, where they would win every softmax; p_old, temperature 0.5, alpha 0.1, clipping and weight decay all at work.

Not covered: CUDA, Transformer Engine, bfloat16. A distributed optimizer's gradient is seen through its norm and the
updated weights alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import reference
import torch
from layouts import Layout, Outcome, Place, play
from torch import Tensor
from truth import LENGTHS, Truth, check_gradient, four_updates, truth, two_updates, worst_gradient, worst_update
from world import World

LAYOUTS = (
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(dp=2),
    Layout(dp=2, distributed_optimizer=True),
    Layout(tp=2, pp=2),
    Layout(tp=4),  # more ranks than KV heads; the last rank's vocabulary is padding alone
    Layout(pp=4),
    Layout(dp=4),
    Layout(tp=2, dp=2),
    Layout(pp=2, dp=2),
    Layout(tp=2, dp=2, distributed_optimizer=True),
    # Interleaved stages
    Layout(pp=2, vpp=2),
    Layout(tp=2, pp=2, vpp=2),
    Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True, overlap=True),
    # Sequence parallelism
    Layout(tp=2, sequence_parallel=True),
    Layout(tp=4, sequence_parallel=True),
    Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
    # Context parallelism
    Layout(cp=2),
    Layout(cp=4),
    Layout(tp=2, cp=2, sequence_parallel=True),
    Layout(pp=2, cp=2),
    Layout(pp=2, vpp=2, cp=2),
    Layout(cp=2, dp=2, distributed_optimizer=True),
    # Overlapped sums and gathers
    Layout(dp=2, overlap=True),
    Layout(dp=4, distributed_optimizer=True, overlap=True),
    Layout(pp=2, dp=2, distributed_optimizer=True, overlap=True),
    # Recomputed activations
    Layout(recompute="uniform"),
    Layout(tp=2, sequence_parallel=True, recompute="selective"),
    Layout(pp=2, cp=2, recompute="block"),
    Layout(pp=2, vpp=2, recompute="uniform"),
    # Documents of a micro-batch padded to one length
    Layout(tp=2, padded=True),
    Layout(pp=2, padded=True, recompute="block"),
    Layout(dp=2, padded=True),
    Layout(tp=2, pp=2, sequence_parallel=True, padded=True),
)

Play = Callable[[Layout, bool], list[Outcome]]

on_every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
tied_and_untied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture(scope="session")
def outcomes(world: World) -> Play:
    """Each layout is played once, and looked at by every test."""

    @functools.cache
    def outcomes_of(layout: Layout, tied: bool) -> list[Outcome]:
        expected = truth(tied)
        return world.run(layout.ranks, play, layout, expected.shape, expected.state, expected.batches)

    return outcomes_of


def worst(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of an entry."""
    return ((found - expected) / expected).abs().max().item()


@tied_and_untied
@on_every_layout
def test_the_batches_are_played_in_several_micro_batches(layout: Layout, tied: bool, outcomes: Play) -> None:
    """Tokens with prompts 1, 6, 3, 8, 5, 2, 7 long: `seven` has 74 + 32 = 106, three packs of at most 50; over two
    replicas two packs each, over four one each. `one` leaves the replicas after the first a filler. `siblings` has 74
    tokens of responses and prompts of 6, 8 and 5, each once: 6 + 12 + 28 + 2 = 48 and 45.

    Padded: 2, 36, 10, 11, 17, 4 and 26 tokens are packs of 36; 26; 2 x 17; and 3 x 10; 2, 46 and 9 of 46 and 2 x 9.
    Every sibling with its own prompt, 18, 34, 15, 9, 27, 8 and 10, of 34; 27; 2 x 18; and 3 x 10."""
    rows = {1: (1, 2, 3, 2), 2: (1, 1, 2, 1), 4: (1, 1, 1, 1)}[layout.dp]
    if layout.cp > 1:  # documents padded to 2 cp, every sibling with its own prompt
        rows = {(2, 1): (1, 2, 3, 3), (4, 1): (1, 2, 3, 4), (2, 2): (1, 1, 2, 2)}[layout.cp, layout.dp]
    if layout.padded:
        rows = {1: (1, 2, 4, 4), 2: (1, 1, 2, 2)}[layout.dp]
    if layout.vpp > 1:
        rows = tuple(-(-count // layout.pp) * layout.pp for count in rows)
    for outcome in outcomes(layout, tied):
        assert tuple(outcome.micro_batches.values()) == rows


@tied_and_untied
@on_every_layout
def test_a_prompt_is_computed_once_in_a_pack(layout: Layout, tied: bool, outcomes: Play) -> None:
    """Of `siblings`, 2 x 6 and 2 x 8 of 121 tokens, on the layouts that share. Over four replicas the families are cut:
    none waits for another so, and no two siblings lie together."""
    for outcome in outcomes(layout, tied):
        reused = {name: load.reused_share for name, load in outcome.loads.items()}
        if layout.cp > 1 or layout.padded:
            assert not any(reused.values())
        else:
            assert reused == {"one": 0, "three": 0, "seven": 0, "siblings": pytest.approx(28 / 121 * (layout.dp < 4))}


@tied_and_untied
@on_every_layout
@pytest.mark.parametrize("batch", LENGTHS)
def test_scores_are_hf_s_on_every_rank(batch: str, layout: Layout, tied: bool, outcomes: Play) -> None:
    """1e-5 for each token: the samples' rollout_logprobs are HF's, so their worst difference is the worst token's."""
    expected = truth(tied).of[batch]
    for outcome in outcomes(layout, tied):
        for scores in (outcome.scores[batch], outcome.l2[batch].scores):
            assert scores.lengths.tolist() == LENGTHS[batch]
            assert scores.rollout_difference.max() < 1e-5
            assert worst(scores.logprobs, expected.logprobs) < 1e-5
            assert worst(scores.entropy, expected.entropies) < 1e-5


@tied_and_untied
@on_every_layout
@pytest.mark.parametrize("batch", LENGTHS)
def test_loss_and_gradient_are_the_reference_s(batch: str, layout: Layout, tied: bool, outcomes: Play) -> None:
    expected = truth(tied).of[batch]
    for outcome in outcomes(layout, tied):
        logprobs = outcome.l2[batch].scores.logprobs
        assert reference.rlsc_loss(logprobs, logprobs, alpha=0.1).item() == pytest.approx(expected.l2.item(), rel=1e-5)
    check_gradient([outcome.l2[batch] for outcome in outcomes(layout, tied)], expected.l2_gradient, layout)


@tied_and_untied
@on_every_layout
def test_batch_max_gradient_is_the_reference_s(layout: Layout, tied: bool, outcomes: Play) -> None:
    """L1 over the largest p_old of the global batch, which only one replica's micro-batch holds."""
    expected = truth(tied).of["seven"].batch_max_gradient
    check_gradient([outcome.batch_max for outcome in outcomes(layout, tied)], expected, layout)


@tied_and_untied
@on_every_layout
def test_weights_after_two_updates_are_the_reference_s(layout: Layout, tied: bool, outcomes: Play) -> None:
    """1e-4 of the change, which is much less than 1e-4 of the weights."""
    weights = outcomes(layout, tied)[0].weights
    assert weights.keys() == truth(tied).shape.hf_tensors().keys()
    assert worst_update(weights, two_updates(tied), truth(tied).state) < 1e-4
    assert not any(outcome.weights for outcome in outcomes(layout, tied)[1:])


@tied_and_untied
@on_every_layout
def test_several_updates_on_one_rollout_are_the_reference_s(layout: Layout, tied: bool, outcomes: Play) -> None:
    """1e-4 of the whole change, p_old computed once."""
    assert worst_update(outcomes(layout, tied)[0].later_weights, four_updates(tied), truth(tied).state) < 1e-4


@tied_and_untied
@on_every_layout
def test_copies_of_a_parameter_stay_equal(layout: Layout, tied: bool, outcomes: Play) -> None:
    """Bit for bit, after the updates: replicas; norms over TP ranks; the two ends of a tied model."""
    by_place = {outcome.place: outcome.replica for outcome in outcomes(layout, tied)}
    assert len(by_place) == layout.ranks
    last_chunk = layout.vpp - 1
    for (tp_rank, pp_rank, _, _), replica in by_place.items():
        for name, parameter in replica.items():
            assert parameter.equal(by_place[Place(tp_rank, pp_rank, 0, 0)][name])
            if name.endswith("layernorm.weight"):
                assert parameter.equal(by_place[Place(0, pp_rank, 0, 0)][name])
        if tied and layout.pp > 1 and pp_rank == layout.pp - 1:
            embedding = by_place[Place(tp_rank, 0, 0, 0)]["0.embedding.word_embeddings.weight"]
            assert replica[f"{last_chunk}.output_layer.weight"].equal(embedding)


def test_the_comparison_would_notice() -> None:
    """What a wrong trainer would do differs from the reference by far more than the tolerances."""
    expected = truth(False)
    wrong_updates: dict[str, dict[str, Tensor]] = {
        "no weight decay": two_updates(False, weight_decay=0.0),
        "no clipping": two_updates(False, clip=1e9),
    }
    for what, weights in wrong_updates.items():
        assert worst_update(weights, two_updates(False), expected.state) > 1e-3, what
    assert worst_gradient(gradient_without_p_old(expected), expected.of["seven"].l2_gradient) > 1e-3
    assert all(reference.norm(of.l2_gradient) > 10 * reference.CLIP for of in expected.of.values())


def gradient_without_p_old(expected: Truth) -> dict[str, Tensor]:
    """With alpha in the place of p_old + alpha."""
    model = reference.tiny_qwen(tied=False)
    logprobs = reference.response_logprobs(model, expected.batches["seven"], temperature=0.5)
    never = torch.full_like(logprobs, -torch.inf)
    return reference.gradients(model, reference.rlsc_loss(logprobs, never, alpha=0.1))
