"""Log-probabilities and gradient under YaRN are transformers', past the original context too.

vLLM's are in tests/rollout. Not covered: Transformer Engine.
"""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from layouts import Layout, backward, build_policy, pack_for, rlsc
from torch import Tensor
from transformers import Qwen2ForCausalLM
from truth import TEMPERATURE, truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.types import ResponseScores, Sample

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
"""The tiny model's 128 tokens, and samples of up to 46: past the original context."""
CASES = {
    "as on Qwen2.5's cards": YARN,
    "every setting": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.5, "truncate": False},
}


def yarn_model(rope_parameters: dict[str, object]) -> Qwen2ForCausalLM:
    """The tiny model's weights under other rotary positions."""
    plain = reference.tiny_qwen(tied=False)
    config = copy.deepcopy(plain.config)
    config.rope_parameters = dict(rope_parameters)
    model = Qwen2ForCausalLM(config).float()
    model.load_state_dict(plain.state_dict())
    return model


def score_and_differentiate(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample]
) -> tuple[ResponseScores, float]:
    policy = build_policy(layout, shape, state, temperature=TEMPERATURE)
    scores = policy.score(pack_for(policy, samples), len(samples))
    return scores, backward(policy, samples, rlsc(0.1), gather=False).norm


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, pp=2), Layout(cp=2, tp=2, sequence_parallel=True), Layout(tp=2, padded=True)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_and_gradient_are_transformers_(case, layout, world: World, tmp_path) -> None:
    expected, model = truth(False), yarn_model(CASES[case])
    model.config.save_pretrained(tmp_path)
    samples = expected.batches["three"]
    assert max(len(s.prompt_token_ids) + len(s.response_token_ids) for s in samples) > 32
    logprobs = reference.response_logprobs(model, samples, temperature=TEMPERATURE)
    norm = reference.norm(reference.gradients(model, reference.rlsc_loss(logprobs, logprobs, alpha=0.1)))
    arguments = (layout, read_shape(tmp_path), expected.state, samples)
    scores, found_norm = world.run(layout.ranks, score_and_differentiate, *arguments)[0]
    torch.testing.assert_close(scores.logprobs.float(), logprobs.detach(), rtol=1e-5, atol=0)
    assert found_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {**YARN, "attention_factor": 1.0},
        {**YARN, "truncate": False},
        {**YARN, "beta_slow": 0.5},
        {**YARN, "original_max_position_embeddings": 128},
    ],
)
def test_the_comparison_would_notice(wrong) -> None:
    samples = truth(False).batches["three"]
    with torch.no_grad():
        right, other = (
            reference.response_logprobs(yarn_model(rope), samples, temperature=TEMPERATURE) for rope in (YARN, wrong)
        )
    assert ((other - right) / right).abs().max() > 1e-3
