"""The tiny model, its batches, and what reference.py makes of them: computed once, held against every layout."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference
import torch
from layouts import Gradient, Layout
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.types import Sample

TEMPERATURE = 0.5
ALPHA = 0.1
LENGTHS = {
    "one": [13],
    "three": [1, 40, 6],
    "seven": [1, 30, 7, 3, 12, 2, 19],
    "siblings": [12, 28, 7, 1, 19, 2, 5],
}
"""Response tokens of each batch: from the stop token alone to most of a micro-batch."""
GROUPS = {"siblings": [1, 1, 3, 3, 3, 1, 4]}
"""Which of them have one prompt: none of the other batches."""


@dataclass(frozen=True, kw_only=True)
class BatchTruth:
    """[B] float32 where not said otherwise."""

    logprobs: Tensor
    entropies: Tensor
    l2: Tensor
    """[] the loss"""
    l2_gradient: dict[str, Tensor]
    batch_max_gradient: dict[str, Tensor]
    """Of L1 over its largest weight."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    shape: ModelShape
    state: dict[str, Tensor]
    """The weights before any update."""
    batches: dict[str, list[Sample]]
    of: dict[str, BatchTruth]
    """By batch."""


@functools.cache
def truth(tied: bool) -> Truth:
    model = reference.tiny_qwen(tied=tied)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        shape = read_shape(Path(folder))
    batches = {
        name: reference.draw_samples(model, lengths, temperature=TEMPERATURE, groups=GROUPS.get(name))
        for name, lengths in LENGTHS.items()
    }
    return Truth(
        shape=shape,
        state={name: tensor.clone() for name, tensor in model.state_dict().items()},
        batches=batches,
        of={name: _batch_truth(model, samples) for name, samples in batches.items()},
    )


def hf_model(tied: bool, state: dict[str, Tensor] | None = None) -> Qwen2ForCausalLM:
    """A fresh copy, to be trained."""
    model = reference.tiny_qwen(tied=tied)
    if state is not None:
        model.load_state_dict(state)
    return model


def _batch_truth(model: Qwen2ForCausalLM, samples: list[Sample]) -> BatchTruth:
    logprobs = reference.response_logprobs(model, samples, temperature=TEMPERATURE)
    l2 = reference.rlsc_loss(logprobs, logprobs, alpha=ALPHA)
    entropies = [reference.token_logprobs(model, sample, temperature=TEMPERATURE)[1].sum() for sample in samples]
    l2_gradient = reference.gradients(model, l2)
    logprobs = reference.response_logprobs(model, samples, temperature=TEMPERATURE)
    batch_max = reference.batch_max_loss(logprobs, logprobs, alpha=0.0)
    return BatchTruth(
        logprobs=logprobs.detach(),
        entropies=torch.stack(entropies).detach(),
        l2=l2.detach(),
        l2_gradient=l2_gradient,
        batch_max_gradient=reference.gradients(model, batch_max),
    )


def rlsc_update(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    *,
    clip: float = reference.CLIP,
    temperature: float = TEMPERATURE,
) -> None:
    """One on-policy step of L2."""
    logprobs = reference.response_logprobs(model, samples, temperature=temperature)
    reference.update(model, optimizer, reference.rlsc_loss(logprobs, logprobs, alpha=ALPHA), clip=clip)


@functools.cache
def one_update(tied: bool) -> dict[str, Tensor]:
    """The weights after a step on `seven`."""
    model = hf_model(tied)
    rlsc_update(model, reference.adamw(model), truth(tied).batches["seven"])
    return model.state_dict()


@functools.cache
def two_updates(
    tied: bool, *, weight_decay: float = reference.WEIGHT_DECAY, clip: float = reference.CLIP
) -> dict[str, Tensor]:
    """The weights after a step on `seven` and one on `three`."""
    model = hf_model(tied)
    optimizer = reference.adamw(model, weight_decay=weight_decay)
    for name in ("seven", "three"):
        rlsc_update(model, optimizer, truth(tied).batches[name], clip=clip)
    return model.state_dict()


@functools.cache
def four_updates(tied: bool) -> dict[str, Tensor]:
    """The weights after `two_updates` and two more on `seven`, whose p_old is what it was before the first of them."""
    model = hf_model(tied)
    optimizer = reference.adamw(model)
    for name in ("seven", "three"):
        rlsc_update(model, optimizer, truth(tied).batches[name])
    samples = truth(tied).batches["seven"]
    old_logprobs = reference.response_logprobs(model, samples, temperature=TEMPERATURE).detach()
    for _ in range(2):
        logprobs = reference.response_logprobs(model, samples, temperature=TEMPERATURE)
        reference.update(model, optimizer, reference.rlsc_loss(logprobs, old_logprobs, alpha=ALPHA))
    return model.state_dict()


def worst_update(found: dict[str, Tensor], expected: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """The largest |found - expected| / |expected - before| of a parameter."""
    return max(
        ((found[name] - expected[name]).norm() / (expected[name] - before[name]).norm()).item() for name in found
    )


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest |found - expected| / |expected| of a parameter; a norm below 1 % of the whole gradient's counts as
    1 % (a key bias has next to none)."""
    assert found.keys() == expected.keys()
    floor = 0.01 * reference.norm(expected)
    return max(((found[name] - grad).norm() / grad.norm().clamp(min=floor)).item() for name, grad in expected.items())


def check_gradient(found: list[Gradient], expected: dict[str, Tensor], layout: Layout) -> None:
    """Of every rank; 1e-5."""
    for gradient in found:
        assert gradient.norm == pytest.approx(reference.norm(expected), rel=1e-5)
    if not layout.distributed_optimizer:
        assert worst_gradient(found[0].by_name, expected) < 1e-5
