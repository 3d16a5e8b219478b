"""bfloat16 with float32 master weights: no further from the truth than transformers' own bfloat16.

The truth is the float32 model of the same weights, rounded to bfloat16 beforehand. Not covered: CUDA's kernels and
Transformer Engine (tests/gpu).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest
import reference
import torch
from layouts import Gradient, Layout, backward, build_policy, hf_weights, pack_for, rlsc, update
from torch import Tensor
from transformers import Qwen2ForCausalLM
from truth import ALPHA, TEMPERATURE, hf_model, truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import ResponseScores, Sample

LAYOUTS = (
    Layout(),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2),
    Layout(cp=2),
    Layout(dp=2, distributed_optimizer=True, overlap=True),
)
LR = 1e-4
"""Less than half the distance between most weights and their neighbours in bfloat16: 2^-9 of 0.08."""
UPDATES = 10


def rounded_state() -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in truth(False).state.items()}


def rounded_model(dtype: torch.dtype) -> Qwen2ForCausalLM:
    return hf_model(False, {name: tensor.float() for name, tensor in rounded_state().items()}).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """HF's, in float32 and in bfloat16."""

    samples: list[Sample]
    """`seven`, whose rollout_logprobs are the float32 model's."""
    logprobs: Tensor
    """[B] the float32 model's."""
    worst_token: float
    """The largest |bfloat16 - float32| of a token's log-probability."""
    gradient: dict[torch.dtype, dict[str, Tensor]]


@functools.cache
def hf() -> Reference:
    samples = truth(False).batches["seven"]
    tokens: dict[torch.dtype, list[Tensor]] = {}
    gradient = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = rounded_model(dtype)
        tokens[dtype] = [token_logprobs(model, sample).detach() for sample in samples]
        sums = torch.stack([token_logprobs(model, sample).sum() for sample in samples])
        grads = reference.gradients(model, reference.rlsc_loss(sums, sums, alpha=ALPHA))
        gradient[dtype] = {name: grad.float() for name, grad in grads.items()}
    return Reference(
        samples=[
            replace(sample, rollout_logprobs=tuple(true.tolist()))
            for sample, true in zip(samples, tokens[torch.float32])
        ],
        logprobs=torch.stack([true.sum() for true in tokens[torch.float32]]),
        worst_token=max((a - b).abs().max().item() for a, b in zip(*tokens.values())),
        gradient=gradient,
    )


def token_logprobs(model: Qwen2ForCausalLM, sample: Sample) -> Tensor:
    """[response] in float32 from the logits on."""
    tokens = torch.tensor([sample.prompt_token_ids + sample.response_token_ids])
    logprobs = (model(tokens).logits[0].float() / TEMPERATURE).log_softmax(-1)[len(sample.prompt_token_ids) - 1 : -1]
    return logprobs.gather(1, torch.tensor(sample.response_token_ids)[:, None])[:, 0]


def differentiate(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample]
) -> tuple[ResponseScores, Gradient]:
    policy = build_policy(layout, shape, state, bf16=True)
    scores = policy.score(pack_for(policy, samples), len(samples))
    weigh = rlsc(ALPHA)
    return scores, backward(policy, samples, weigh, gather=not layout.distributed_optimizer)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return reference.norm({name: found[name].float() - expected[name] for name in expected}) / reference.norm(expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_as_near_to_float32_as_transformers_bfloat16(layout: Layout, world: World) -> None:
    """Within twice its error of a token and of the gradient: the two round at other places."""
    expected = hf()
    arguments = (layout, truth(False).shape, rounded_state(), expected.samples)
    scores, gradient = world.run(layout.ranks, differentiate, *arguments)[0]
    assert expected.worst_token > 1e-3, "bfloat16 shows"
    assert scores.rollout_difference.max() < 2 * expected.worst_token
    # Roundings of n tokens add up like a random walk.
    walk = 2 * expected.worst_token * scores.lengths.sqrt()
    assert ((scores.logprobs - expected.logprobs).abs() < walk).all()
    true_gradient = expected.gradient[torch.float32]
    hf_distance = distance(expected.gradient[torch.bfloat16], true_gradient)
    assert gradient.norm == pytest.approx(reference.norm(true_gradient), rel=2 * hf_distance)
    if gradient.by_name:
        assert distance(gradient.by_name, true_gradient) < 2 * hf_distance


def learn(layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample]) -> dict[str, Tensor]:
    policy = build_policy(layout, shape, state, bf16=True, lr=LR)
    for _ in range(UPDATES):
        update(policy, samples)
    return hf_weights(policy)


@functools.cache
def learned(dtype: torch.dtype) -> dict[str, Tensor]:
    """By HF and torch AdamW in one dtype, weights and optimizer."""
    model, samples = rounded_model(dtype), hf().samples
    optimizer = reference.adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = LR
    for _ in range(UPDATES):
        logprobs = torch.stack([token_logprobs(model, sample).sum() for sample in samples])
        reference.update(model, optimizer, reference.rlsc_loss(logprobs, logprobs, alpha=ALPHA))
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name].float() - tensor.float() for name, tensor in rounded_state().items()}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_updates_too_small_for_bfloat16_add_up_in_the_master_weights(layout: Layout, world: World) -> None:
    """Ten updates of 1e-4 move a weight by 1e-3, which bfloat16 shows; one by one it rounds most of them away, as the
    run with bfloat16 weights alone shows. Half of the float32 change is what rounding at the end may cost."""
    weights = world.run(layout.ranks, learn, layout, truth(False).shape, rounded_state(), hf().samples)[0]
    true = change(learned(torch.float32))
    assert distance(change(weights), true) < 0.5
    assert distance(change(learned(torch.bfloat16)), true) > 0.8
