"""Responses packed into micro-batches of at most so many tokens, as many for every data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlsc.types import MicroBatch, Sample

FILLER = -1
"""The sample id of a document that counts for nothing."""


def plan_packs(lengths: Sequence[int], *, dp_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Which samples go into which micro-batch of which replica.

    Longest first, each into the emptiest of the packs that has room (LPT), with the least number of packs for which
    that works out; every replica gets the same number of them.

    Args:
        lengths: [B] tokens of each sample, prompt included.
        dp_size: data-parallel replicas.
        max_tokens: of one micro-batch.

    Returns:
        [dp_size][micro-batches] lists of sample ids; a list may be empty when there are fewer samples than packs.

    Raises:
        ValueError: a sample is longer than a micro-batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if lengths and lengths[order[0]] > max_tokens:
        raise ValueError(
            f"a sample of {lengths[order[0]]} tokens does not fit a micro-batch of {max_tokens}: "
            f"raise --max-tokens-per-micro-batch"
        )
    per_replica = max(1, math.ceil(sum(lengths) / (max_tokens * dp_size)))
    while True:
        packs: list[list[int]] = [[] for _ in range(per_replica * dp_size)]
        loads = [0] * len(packs)
        for i in order:
            emptiest = min(range(len(packs)), key=loads.__getitem__)
            if loads[emptiest] + lengths[i] > max_tokens:
                break
            packs[emptiest].append(i)
            loads[emptiest] += lengths[i]
        else:
            break
        per_replica += 1
    # Heaviest packs dealt back and forth over the replicas, so that their sums come out even.
    packs.sort(key=lambda pack: -sum(lengths[i] for i in pack))
    replicas: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for row in range(per_replica):
        dealt = packs[row * dp_size : (row + 1) * dp_size]
        for replica, pack in zip(replicas, dealt if row % 2 == 0 else reversed(dealt), strict=True):
            replica.append(pack)
    return replicas


def build_micro_batch(samples: Sequence[Sample], sample_ids: Sequence[int], *, device: torch.device) -> MicroBatch:
    """Lays the samples end to end. `sample_ids` are their rows in the global batch."""
    tokens: list[int] = []
    bounds = [0]
    positions: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    rollout_logprobs: list[float] = []
    for document, sample in enumerate(samples):
        first = len(tokens) + len(sample.prompt_token_ids) - 1
        positions.extend(range(first, first + len(sample.response_token_ids)))
        targets.extend(sample.response_token_ids)
        segments.extend([document] * len(sample.response_token_ids))
        rollout_logprobs.extend(sample.rollout_logprobs)
        tokens.extend(sample.prompt_token_ids)
        tokens.extend(sample.response_token_ids)
        bounds.append(len(tokens))

    def ids(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return MicroBatch(
        tokens=ids(tokens),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=max(sample.length for sample in samples),
        positions=ids(positions),
        targets=ids(targets),
        segments=ids(segments),
        rollout_logprobs=torch.tensor(rollout_logprobs, dtype=torch.float32, device=device),
        sample_ids=ids(sample_ids),
    )


def pack(
    samples: Sequence[Sample], dp_rank: int, dp_size: int, max_tokens: int, device: torch.device
) -> list[MicroBatch]:
    """One replica's micro-batches of the global batch; where a pack would be empty, the shortest sample fills it."""
    plan = plan_packs([sample.length for sample in samples], dp_size=dp_size, max_tokens=max_tokens)
    shortest = min(samples, key=lambda sample: sample.length)
    return [
        build_micro_batch([samples[i] for i in ids] or [shortest], ids or [FILLER], device=device)
        for ids in plan[dp_rank]
    ]
