"""Micro-batches: how samples are laid out in a pack. Which pack they go into is test_packing.py's.

Not covered: that a model reads the layout as it is meant (tests/policy).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_rlsc.batching import FILLER, build_micro_batch, pack
from megatron_rlsc.types import DataShare, MicroBatch, Sample, SharedPrompts

CPU = torch.device("cpu")
MAX_TOKENS = 40


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
    batch = build_micro_batch(samples, [4, 9], share=DataShare(), device=CPU)
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


def test_the_example_of_shared_prompts_docstring() -> None:
    """`z` as a sibling of `xy`: predicted where `ab` ends, and attending to `ab` and itself."""
    samples = [sample_of("ab", "xy", (-0.5, -0.25)), sample_of("ab", "z", (-2.0,))]
    batch = build_micro_batch(samples, [4, 9], share=DataShare(), device=CPU, share_prompts=True)
    assert batch.shared is not None
    assert letters(batch.tokens) == "abxyz"
    assert batch.cu_seqlens.tolist() == [0, 4, 5]
    assert batch.positions.tolist() == [1, 2, 1]
    assert letters(batch.targets) == "xyz"
    assert batch.segments.tolist() == [0, 0, 1]
    assert batch.shared.position_ids.tolist() == [0, 1, 2, 3, 2]
    assert batch.shared.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert batch.shared.cu_seqlens_kv.tolist() == [0, 4, 7]
    assert (batch.shared.max_seqlen_q, batch.max_seqlen) == (4, 4)
    assert batch.rollout_logprobs.tolist() == [-0.5, -0.25, -2.0]
    assert batch.sample_ids.tolist() == [4, 9]
    drawing = (SharedPrompts.__doc__ or "").splitlines()
    assert "        tokens         a b x y z" in drawing
    assert "        cu_seqlens     0       4 5" in drawing
    assert "        positions        1 2 1" in drawing
    assert "        targets          x y z" in drawing
    assert "        position_ids   0 1 2 3 2" in drawing
    assert "        kv_index       0 1 2 3 0 1 4" in drawing
    assert "        cu_seqlens_kv  0       4     7" in drawing


def test_a_prompt_that_no_sibling_has_is_not_shared() -> None:
    samples = [sample_of("ab", "xy"), sample_of("c", "z")]
    assert build_micro_batch(samples, [4, 9], share=DataShare(), device=CPU, share_prompts=True).shared is None


def test_siblings_need_not_lie_side_by_side() -> None:
    """`ab` is read across `c`; the padding of the pack's end goes on behind the last document."""
    samples = [sample_of("ab", "xy"), sample_of("c", "w"), sample_of("ab", "z")]
    batch = build_micro_batch(samples, [0, 1, 2], share=DataShare(sp_size=4), device=CPU, share_prompts=True)
    assert batch.shared is not None
    assert letters(batch.tokens) == "abxycwz\0"
    assert batch.positions.tolist() == [1, 2, 4, 1]
    assert batch.shared.kv_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6, 7]
    assert batch.shared.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (batch.shared.max_seqlen_q, batch.max_seqlen) == (4, 4)


def test_dtypes() -> None:
    batch = build_micro_batch([sample_of("a", "b")], [0], share=DataShare(), device=CPU)
    ids = (batch.tokens, batch.positions, batch.targets, batch.segments, batch.sample_ids)
    assert {tensor.dtype for tensor in ids} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.rollout_logprobs.dtype == torch.float32


def test_an_empty_pack_holds_the_shortest_sample_as_filler() -> None:
    samples = [sample_of("abc", "xyz"), sample_of("a", "z")]
    real, filler = (
        pack(samples, DataShare(dp_rank=rank, dp_size=4), max_tokens=8, device=CPU).micro_batches for rank in (1, 2)
    )
    assert [batch.sample_ids.tolist() for batch in real] == [[1]]
    assert [batch.sample_ids.tolist() for batch in filler] == [[FILLER]]
    assert letters(filler[0].tokens) == "az"


def test_two_context_parallel_ranks_share_each_document() -> None:
    """`abcde` and `xy`, padded to multiples of 4: `abcde...` has four chunks of 2, of which rank 0 has the first and
    the last, rank 1 the two between; `xy..` has four of 1. Responses `cde` and `y` are predicted at `b`, `c`, `d` and
    `x`: `b` and `x` are rank 0's 2nd and 5th tokens, `c` and `d` rank 1's 1st and 2nd."""
    samples = [sample_of("ab", "cde", (-1.0, -2.0, -3.0)), sample_of("x", "y", (-4.0,))]
    first, second = (
        build_micro_batch(samples, [0, 1], share=DataShare(cp_rank=rank, cp_size=2), device=CPU) for rank in (0, 1)
    )
    assert letters(first.tokens) == "ab\0\0x\0" and letters(second.tokens) == "cde\0y\0"
    assert first.cu_seqlens.tolist() == second.cu_seqlens.tolist() == [0, 8, 12]
    assert first.max_seqlen == 8
    assert (first.positions.tolist(), letters(first.targets), first.segments.tolist()) == ([1, 4], "cy", [0, 1])
    assert (second.positions.tolist(), letters(second.targets), second.segments.tolist()) == ([0, 1], "de", [0, 0])
    assert first.rollout_logprobs.tolist() == [-1.0, -4.0] and second.rollout_logprobs.tolist() == [-2.0, -3.0]


def test_the_pack_is_padded_for_sequence_parallelism_at_its_end_alone() -> None:
    """3 + 2 tokens in four equal parts: 8."""
    samples = [sample_of("a", "bc"), sample_of("x", "y")]
    batch = build_micro_batch(samples, [0, 1], share=DataShare(sp_size=4), device=CPU)
    assert letters(batch.tokens) == "abcxy\0\0\0"
    assert batch.cu_seqlens.tolist() == [0, 3, 8]


@pytest.mark.parametrize(
    ("cp_size", "sp_size", "document_multiple", "pack_multiple"),
    [(1, 1, 1, 1), (1, 4, 1, 4), (2, 1, 4, 4), (2, 2, 4, 4), (2, 4, 4, 8), (4, 3, 8, 24)],
)
def test_what_is_padded_to(cp_size: int, sp_size: int, document_multiple: int, pack_multiple: int) -> None:
    """Two chunks a CP rank for a document; of a pack, an equal part for each CP x SP rank as well."""
    share = DataShare(cp_size=cp_size, sp_size=sp_size)
    assert (share.document_multiple, share.pack_multiple) == (document_multiple, pack_multiple)


@st.composite
def grids(draw: st.DrawFn) -> DataShare:
    """Of any rank; its ranks are filled in by the test."""
    sizes = {name: draw(st.integers(1, 3)) for name in ("dp_size", "cp_size", "sp_size", "micro_batch_multiple")}
    return DataShare(**sizes)


@given(lengths=st.lists(st.integers(2, 36), min_size=1, max_size=60), grid=grids())
@example(lengths=[36] * 7, grid=DataShare(dp_size=2))
@example(lengths=[2], grid=DataShare(dp_size=5, cp_size=2))
def test_every_sample_once_within_the_capacity_as_many_packs_a_rank(lengths: list[int], grid: DataShare) -> None:
    samples = [sample_of("p" * (1 + i % (n - 1)), "r" * (n - 1 - i % (n - 1))) for i, n in enumerate(lengths)]
    assert [sample.length for sample in samples] == lengths
    ranks = {
        (dp, cp): pack(samples, replace(grid, dp_rank=dp, cp_rank=cp), max_tokens=MAX_TOKENS, device=CPU).micro_batches
        for dp in range(grid.dp_size)
        for cp in range(grid.cp_size)
    }
    counts = {len(batches) for batches in ranks.values()}
    assert len(counts) == 1, "a schedule of unequal length would hang"
    assert counts.pop() % grid.micro_batch_multiple == 0
    seen: list[int] = []
    for dp in range(grid.dp_size):
        for parts in zip(*(ranks[dp, cp] for cp in range(grid.cp_size)), strict=True):
            seen += [i for i in parts[0].sample_ids.tolist() if i != FILLER]
            check_pack(list(parts), samples, grid)
    assert sorted(seen) == list(range(len(samples)))


def check_pack(parts: list[MicroBatch], samples: list[Sample], grid: DataShare) -> None:
    """What the CP ranks have of one pack, put together again."""
    batch, cp_size = parts[0], len(parts)
    bounds = batch.cu_seqlens.tolist()
    assert all(part.cu_seqlens.equal(batch.cu_seqlens) for part in parts)
    assert all(part.sample_ids.equal(batch.sample_ids) for part in parts)
    assert len({len(part.tokens) for part in parts}) == 1 and len(batch.tokens) % grid.sp_size == 0
    assert bounds[0] == 0 and bounds[-1] == cp_size * len(batch.tokens) <= MAX_TOKENS
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert (batch.sample_ids == FILLER).any() <= (len(batch.sample_ids) == 1), "a filler is alone in its pack"
    for document, i in enumerate(batch.sample_ids.tolist()):
        start, stop = (bound // cp_size for bound in bounds[document : document + 2])
        own = [part.tokens[start:stop] for part in parts]
        halves = [part.chunk(2) for part in own]
        whole = torch.cat([*(h[0] for h in halves), *(h[1] for h in reversed(halves))]) if cp_size > 1 else own[0]
        if i == FILLER:
            continue
        sample = samples[i]
        assert tuple(whole[: sample.length].tolist()) == sample.prompt_token_ids + sample.response_token_ids
        assert (whole[sample.length :] == 0).all() and len(whole) - sample.length < grid.document_multiple + (
            grid.pack_multiple if document == len(bounds) - 2 else 0
        )
        targets = [tuple(part.targets[part.segments == document].tolist()) for part in parts]
        assert sum(map(len, targets)) == len(sample.response_token_ids)
        for part in parts:
            mine = part.segments == document
            assert ((part.positions[mine] >= start) & (part.positions[mine] < stop)).all(), "of its own document"
        if cp_size == 1:  # a position predicts the token behind it
            assert targets[0] == sample.response_token_ids
            mine = batch.segments == document
            assert batch.tokens[batch.positions[mine] + 1].equal(batch.targets[mine])


def test_one_token_more_than_the_layout_can_pad_is_refused() -> None:
    """39 tokens are padded to 40 at CP 2; a budget of 40 holds them, one of 39 has room for 36."""
    samples = [sample_of("a" * 38, "b")]
    assert len(pack(samples, DataShare(cp_size=2), max_tokens=40, device=CPU).micro_batches) == 1
    with pytest.raises(ValueError, match="40 tokens does not fit a micro-batch of 36"):
        pack(samples, DataShare(cp_size=2), max_tokens=39, device=CPU)
