"""Packs: which sample goes where, and how it is laid out there.

Not covered: that a model reads the layout as it is meant (tests/policy), and how far from the best balance packs are.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rlsc.batching import FILLER, build_micro_batch, pack, plan_packs
from megatron_rlsc.types import MicroBatch, Sample

CPU = torch.device("cpu")


def sample_of(prompt: str, response: str, logprobs: tuple[float, ...] | None = None) -> Sample:
    """A letter is a token."""
    return Sample(
        group=0,
        sample=0,
        prompt_index=0,
        prompt_token_ids=tuple(map(ord, prompt)),
        response_token_ids=tuple(map(ord, response)),
        rollout_logprobs=logprobs or (0.0,) * len(response),
        finish_reason="stop",
        seed=0,
        version="",
    )


def letters(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


def test_the_example_of_micro_batch_s_docstring() -> None:
    """Prompts `ab` and `c`, responses `xy` and `z`, column by column as types.MicroBatch draws them."""
    samples = [sample_of("ab", "xy", (-0.5, -0.25)), sample_of("c", "z", (-2.0,))]
    batch = build_micro_batch(samples, [4, 9], device=CPU)
    assert letters(batch.tokens) == "abxycz"
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.positions.tolist() == [1, 2, 4]
    assert letters(batch.targets) == "xyz"
    assert batch.segments.tolist() == [0, 0, 1]
    assert batch.max_seqlen == 4
    assert batch.rollout_logprobs.tolist() == [-0.5, -0.25, -2.0]
    assert batch.sample_ids.tolist() == [4, 9]
    drawing = (MicroBatch.__doc__ or "").splitlines()
    assert "        tokens       a b x y c z" in drawing
    assert "        cu_seqlens   0       4   6" in drawing
    assert any(line.startswith("        positions      1 2   4 ") for line in drawing)
    assert "        targets        x y   z" in drawing
    assert "        segments       0 0   1" in drawing


def test_dtypes() -> None:
    batch = build_micro_batch([sample_of("a", "b")], [0], device=CPU)
    ids = (batch.tokens, batch.positions, batch.targets, batch.segments, batch.sample_ids)
    assert {tensor.dtype for tensor in ids} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.rollout_logprobs.dtype == torch.float32


def test_longest_first_into_the_emptiest() -> None:
    """5 4 3 3 2 1 = 18 tokens into packs of 10: two. 5 | 4, then 3 to the second (4+3=7), 3 to the first (5+3=8), 2 to
    the second (9), 1 to the first (9)."""
    assert plan_packs([3, 5, 1, 4, 3, 2], dp_size=1, max_tokens=10) == [[[1, 4, 2], [3, 0, 5]]]


def test_one_pack_more_where_the_least_number_does_not_work_out() -> None:
    """4 4 4 of 12 tokens, packs of 6: two would hold them by their sum, but not two of them in one: three."""
    assert plan_packs([4, 4, 4], dp_size=1, max_tokens=6) == [[[0], [1], [2]]]


def test_packs_are_dealt_back_and_forth_by_weight() -> None:
    """Packs of 8, 7, 6, 5 on two replicas: 8 + 5 and 7 + 6, which is 13 each."""
    assert plan_packs([8, 7, 6, 5], dp_size=2, max_tokens=8) == [[[0], [3]], [[1], [2]]]


def test_fewer_samples_than_replicas_leave_packs_empty() -> None:
    assert plan_packs([3, 5], dp_size=4, max_tokens=8) == [[[1]], [[0]], [[]], [[]]]


def test_an_empty_pack_holds_the_shortest_sample_as_filler() -> None:
    samples = [sample_of("abc", "xyz"), sample_of("a", "z")]
    real, filler = (pack(samples, dp_rank=rank, dp_size=4, max_tokens=8, device=CPU) for rank in (1, 2))
    assert [batch.sample_ids.tolist() for batch in real] == [[1]]
    assert [batch.sample_ids.tolist() for batch in filler] == [[FILLER]]
    assert letters(filler[0].tokens) == "az"


def test_a_sample_longer_than_a_micro_batch_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"9 tokens does not fit a micro-batch of 8: raise --max-tokens-per-micro-ba"):
        plan_packs([3, 9, 4], dp_size=2, max_tokens=8)


MAX_TOKENS = 40


@given(
    lengths=st.lists(st.integers(2, MAX_TOKENS), min_size=1, max_size=60),
    dp_size=st.integers(1, 5),
)
@example(lengths=[MAX_TOKENS] * 7, dp_size=2)
@example(lengths=[2], dp_size=5)
def test_every_sample_once_within_the_capacity_as_many_packs_a_replica(lengths: list[int], dp_size: int) -> None:
    samples = [sample_of("p" * (1 + i % (n - 1)), "r" * (n - 1 - i % (n - 1))) for i, n in enumerate(lengths)]
    assert [sample.length for sample in samples] == lengths
    replicas = [
        pack(samples, dp_rank=rank, dp_size=dp_size, max_tokens=MAX_TOKENS, device=CPU) for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in replicas}) == 1, "a schedule of unequal length would hang"
    batches = [batch for replica in replicas for batch in replica]
    assert all(len(batch.tokens) <= MAX_TOKENS for batch in batches)
    ids = sorted(i for batch in batches for i in batch.sample_ids.tolist() if i != FILLER)
    assert ids == list(range(len(samples)))
    for batch in batches:
        assert (batch.sample_ids == FILLER).any() <= (len(batch.sample_ids) == 1), "a filler is alone in its pack"
        bounds = batch.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(batch.tokens))
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
        for document, i in enumerate(batch.sample_ids.tolist()):
            if i == FILLER:
                continue
            own = batch.segments == document
            assert tuple(batch.tokens[bounds[document] : bounds[document + 1]].tolist()) == (
                samples[i].prompt_token_ids + samples[i].response_token_ids
            )
            assert tuple(batch.targets[own].tolist()) == samples[i].response_token_ids
            # A position predicts the token behind it, within its document.
            assert batch.tokens[batch.positions[own] + 1].equal(batch.targets[own])
            assert int(batch.positions[own][-1]) == bounds[document + 1] - 2


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40), dp_size=st.integers(1, 4))
def test_replicas_differ_by_one_pack_at_most(lengths: list[int], dp_size: int) -> None:
    """Dealt back and forth, a replica's sum is off another's by at most one pack."""
    plan = plan_packs(lengths, dp_size=dp_size, max_tokens=20)
    sums = [sum(lengths[i] for ids in replica for i in ids) for replica in plan]
    assert max(sums) - min(sums) <= 20
