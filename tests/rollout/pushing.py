"""Pushes into a served tiny model, and the one question that tells whether its weights are live."""

from __future__ import annotations

from typing import Any

import torch
from served_tiny import PROMPTS, TinyModel

from megatron_rlsc.rollout.buckets import TensorSpec
from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.weight_sync import WeightSync

PROBE = (*PROMPTS[0].token_ids, *range(20))
SMALL = 2**14
"""Bytes of a bucket, so that the tiny model has a dozen."""


def specs_of(weights: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=name, dtype=value.dtype, shape=tuple(value.shape)) for name, value in weights.items()]


def build_sync(sidecar: Sidecar, tiny: TinyModel, **options: Any) -> WeightSync:
    """Into that sidecar alone, as one that others run: it is not started anew when it fails."""
    fleet = Fleet([Replica(index=0, url=sidecar.url, key=sidecar.key)])
    return WeightSync(fleet, **{"specs": specs_of(tiny.weights()), "timeout": 60.0, **options})


def difference(tiny: TinyModel, sync: WeightSync, version: str) -> float:
    """The largest, of a token of PROBE, between what is served and the model itself, at T=1."""
    (found,) = sync.probe(PROBE, version)
    with torch.no_grad():
        rows = torch.log_softmax(tiny.model(torch.tensor([PROBE])).logits[0], -1)[:-1]
    expected = rows.gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]
    return (expected - torch.tensor(found)).abs().max().item()
