"""Micro-batches: how the samples of a pack are laid end to end, and which part of it a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from megatron_rlsc.packing import BY_TOKENS, Document, Work, plan_packs
from megatron_rlsc.types import Batch, DataShare, MicroBatch, Sample, SharedPrompts

FILLER = -1
"""The sample id of a document that counts for nothing."""
PADDING = 0
"""A token like any other, behind a document's end: nothing attends to it and nothing is read off it."""


def build_micro_batch(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    *,
    share: DataShare,
    device: torch.device,
    share_prompts: bool = False,
) -> MicroBatch:
    """Lays the samples end to end, and takes this rank's part.

    Args:
        sample_ids: their rows in the global batch.
        share_prompts: a prompt stands in front of its first response alone, and the others read it there. Not under
            context parallelism, where a document's keys are spread over ranks.
    """
    assert not (share_prompts and share.cp_size > 1), "context parallelism cuts every document by itself"
    tokens: list[int] = []
    bounds, keys = [0], [0]
    positions: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    rollout_logprobs: list[float] = []
    position_ids: list[int] = []
    kv_index: list[int] = []
    prompts: dict[tuple[int, ...], range] = {}  # where each of them stands
    for document, sample in enumerate(samples):
        prompt, response, start = sample.prompt_token_ids, sample.response_token_ids, len(tokens)
        elsewhere = prompts.get(prompt) if share_prompts else None
        if elsewhere is None:
            tokens.extend(prompt)
        here = prompts.setdefault(prompt, range(start, len(tokens))) if share_prompts else range(start, len(tokens))
        behind = len(tokens)
        positions.extend([here[-1], *range(behind, behind + len(response) - 1)])
        targets.extend(response)
        segments.extend([document] * len(response))
        rollout_logprobs.extend(sample.rollout_logprobs)
        tokens.extend(response)
        multiple = share.document_multiple if document < len(samples) - 1 else share.pack_multiple
        tokens.extend([PADDING] * (-len(tokens) % multiple))
        bounds.append(len(tokens))
        kv_index.extend([*(elsewhere or ()), *range(start, len(tokens))])
        keys.append(len(kv_index))
        offset = 0 if elsewhere is None else len(prompt)
        position_ids.extend(range(offset, offset + len(tokens) - start))

    def ids(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def cumulative(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def longest(bounds: Sequence[int]) -> int:
        return max(stop - start for start, stop in pairwise(bounds))

    shared = SharedPrompts(
        position_ids=ids(position_ids).to(device),
        kv_index=ids(kv_index).to(device),
        cu_seqlens_kv=cumulative(keys),
        max_seqlen_q=longest(bounds),
    )
    part = _part_of(bounds, share)
    place = torch.full((len(tokens),), -1).index_copy(0, part, torch.arange(len(part)))[ids(positions)]
    mine = place >= 0
    return MicroBatch(
        tokens=ids(tokens)[part].to(device),
        cu_seqlens=cumulative(bounds),
        max_seqlen=longest(keys),
        positions=place[mine].to(device),
        targets=ids(targets)[mine].to(device),
        segments=ids(segments)[mine].to(device),
        responses=tuple(len(sample.response_token_ids) for sample in samples),
        rollout_logprobs=torch.tensor(rollout_logprobs, dtype=torch.float32)[mine].to(device),
        sample_ids=ids(sample_ids).to(device),
        shared=shared if len(kv_index) > len(tokens) else None,
    )


def build_filler(share: DataShare, *, device: torch.device) -> MicroBatch:
    """The shortest micro-batch that there is, which counts for nothing."""
    sample = Sample(
        group=0,
        sample=0,
        prompt_index=0,
        prompt_token_ids=(PADDING,),
        response_token_ids=(PADDING,),
        rollout_logprobs=(0.0,),
        finish_reason="length",
        seed=0,
        version="",
    )
    return build_micro_batch([sample], [FILLER], share=share, device=device)


def _part_of(bounds: Sequence[int], share: DataShare) -> Tensor:
    """[t] where the tokens of this context-parallel rank stand in the whole pack."""
    chunks: list[Tensor] = []
    for start, stop in pairwise(bounds):
        document = torch.arange(start, stop).chunk(share.document_multiple)
        chunks += [document[share.cp_rank], document[-1 - share.cp_rank]] if share.cp_size > 1 else document
    return torch.cat(chunks)


def pack(
    samples: Sequence[Sample],
    share: DataShare,
    *,
    max_tokens: int,
    device: torch.device,
    layout: Literal["packed", "padded"] = "packed",
    share_prompts: bool = False,
    work: Work = BY_TOKENS,
) -> Batch:
    """A rank's micro-batches of the global batch; where a pack would be empty, the shortest sample fills it.

    Of the `padded` layout a micro-batch holds as many samples as have room when all are as long as its longest; it is
    the model that pads them.

    Args:
        max_tokens: of a micro-batch, over all context-parallel ranks.
        share_prompts: see `build_micro_batch`.
        work: what packs are balanced by.

    Raises ValueError where a sample, padded as the layout asks, is longer than `max_tokens`.
    """
    families: dict[object, int] = {}
    documents = [
        Document(
            prompt=len(sample.prompt_token_ids),
            response=len(sample.response_token_ids),
            family=families.setdefault(sample.prompt_token_ids if share_prompts else row, len(families)),
        )
        for row, sample in enumerate(samples)
    ]
    plan = plan_packs(documents, share, max_tokens=max_tokens, work=work, layout=layout)
    shortest = min(samples, key=lambda sample: sample.length)
    micro_batches = [
        build_micro_batch(
            [samples[i] for i in ids] or [shortest],
            ids or [FILLER],
            share=share,
            device=device,
            share_prompts=share_prompts,
        )
        for ids in plan.replicas[share.dp_rank]
    ]
    return Batch(micro_batches=micro_batches, load=plan.load)
