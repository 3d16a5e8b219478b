"""Log-probabilities and gradients in bfloat16 err from transformers' float32 by no more than its own bfloat16 does.

Not covered: more than one rank, long contexts (test_memory.py has one), dropout (there is none).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import hf
import pytest
import torch
from hf import Model, all_logprobs, rms
from policies import all_logprobs as policy_logprobs
from policies import build_policy, one_batch, read_all
from torch import Tensor

from megatron_rlsc.batching import pack
from megatron_rlsc.conversion.rules import Spec
from megatron_rlsc.policy.parallel import Parallel
from megatron_rlsc.types import Sample

RATIO = 1.5
"""Of root mean squares. Two bfloat16 computations of one thing differ in their order of operations."""
WORST = 2.5
"""Of the largest errors: of a token, and of a parameter's gradient."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    samples: list[Sample]
    exact: Tensor
    """[n] float32"""
    error: Tensor
    """[n] of transformers' bfloat16."""


@functools.cache
def truth_of(model: Model, device: torch.device) -> Truth:
    pytest.importorskip("transformers")
    state, samples = model.state(device), model.samples()
    exact = all_logprobs(hf.build(model, state, torch.float32), samples)
    rounded = all_logprobs(hf.build(model, state, torch.bfloat16), samples)
    assert rms(rounded - exact) > 0
    return Truth(samples=samples, exact=exact, error=rounded - exact)


@pytest.fixture
def truth(model: Model, parallel: Parallel) -> Truth:
    return truth_of(model, parallel.device)


def check(error: Tensor, expected: Tensor) -> None:
    assert rms(error) < RATIO * rms(expected)
    assert error.abs().max() < WORST * expected.abs().max()


def test_log_probabilities(model: Model, spec: Spec, truth: Truth, parallel: Parallel) -> None:
    policy = build_policy(model, spec, parallel)
    check(policy_logprobs(policy, one_batch(truth.samples, parallel)) - truth.exact, truth.error)


def test_padded_documents(model: Model, spec: Spec, truth: Truth, parallel: Parallel) -> None:
    policy = build_policy(model, spec, parallel, layout="padded")
    check(policy_logprobs(policy, one_batch(truth.samples, parallel)) - truth.exact, truth.error)


def test_a_pack_is_each_document_alone(model: Model, spec: Spec, truth: Truth, parallel: Parallel) -> None:
    """In any order, too. Were documents to see each other, the difference would be of another size."""
    policy = build_policy(model, spec, parallel)
    packed = policy_logprobs(policy, one_batch(truth.samples, parallel))
    alone = torch.cat([policy_logprobs(policy, one_batch([sample], parallel)) for sample in truth.samples])
    check(packed - alone, truth.error)
    backwards = policy_logprobs(policy, one_batch(truth.samples[::-1], parallel))
    lengths = [len(sample.response_token_ids) for sample in truth.samples]
    check(torch.cat(backwards.split(lengths[::-1])[::-1]) - alone, truth.error)

    joined = one_batch(truth.samples, parallel)
    seeing = policy_logprobs(policy, replace(joined, cu_seqlens=joined.cu_seqlens[[0, -1]], max_seqlen=model.tokens))
    first = lengths[0]
    check(seeing[:first] - alone[:first], truth.error)
    assert rms(seeing[first:] - alone[first:]) > 10 * rms(truth.error)


def test_scores_do_not_depend_on_the_packs(model: Model, spec: Spec, truth: Truth, parallel: Parallel) -> None:
    """By the loop's own way: packed by the planner, summed by response."""
    policy = build_policy(model, spec, parallel)
    longest = max(sample.length for sample in truth.samples)
    sums = []
    for max_tokens in (longest, model.tokens):
        batch = pack(truth.samples, parallel.data_share, max_tokens=max_tokens, device=parallel.device)
        sums.append(policy.score(batch.micro_batches, len(truth.samples)).logprobs)
    assert len(batch.micro_batches) == 1
    lengths = torch.tensor([len(sample.response_token_ids) for sample in truth.samples])
    per_token = (sums[0] - sums[1]) / lengths
    assert per_token.abs().max() < WORST * truth.error.abs().max()


def test_siblings_that_share_their_prompt(model: Model, spec: Spec, truth: Truth, parallel: Parallel) -> None:
    """Log-probabilities and gradient are those of siblings with a prompt each, but for bfloat16; were a response to see
    another's, or not its prompt, they would be of another size."""
    prompt = max((sample.prompt_token_ids for sample in truth.samples), key=len)
    siblings = [replace(sample, prompt_token_ids=prompt) for sample in truth.samples]
    policy = build_policy(model, spec, parallel)
    logprobs, gradients = [], []
    for share in (False, True):
        batch = one_batch(siblings, parallel, share_prompts=share)
        assert (batch.shared is not None) == share
        logprobs.append(policy_logprobs(policy, batch))
        policy.forward_backward([batch], len(siblings), lambda logprobs, lengths, rows: torch.ones_like(logprobs))
        gradients.append(read_all(policy, "main_grad"))
    check(logprobs[1] - logprobs[0], truth.error)
    apart, together = gradients
    assert total({name: together[name] - apart[name] for name in apart}) < 0.02 * total(apart)


def test_gradients(model: Model, spec: Spec, parallel: Parallel) -> None:
    """Of -mean sum log p: the whole gradient's relative error, and that of each parameter where it is no small one."""
    pytest.importorskip("transformers")
    state, samples = model.state(parallel.device), model.samples()
    exact = hf.gradients(hf.build(model, state, torch.float32), samples, Tensor.float)
    rounded = hf.gradients(hf.build(model, state, torch.bfloat16), samples, Tensor.float)
    policy = build_policy(model, spec, parallel)
    policy.forward_backward(
        [one_batch(samples, parallel)], len(samples), lambda logprobs, lengths, rows: torch.ones_like(logprobs)
    )
    found = read_all(policy, "main_grad")
    assert found.keys() <= exact.keys()

    floor = 0.01 * total(exact)
    errors = {name: (found[name] - exact[name]).norm().item() for name in found}
    expected = {name: (rounded[name] - exact[name]).norm().item() for name in found}
    assert sum(e**2 for e in errors.values()) < RATIO**2 * sum(e**2 for e in expected.values())
    for name, error in errors.items():
        assert error < WORST * max(expected[name], floor * 0.01), name
    assert total(found) == pytest.approx(total(exact), rel=0.02)


def total(gradient: dict[str, Tensor]) -> float:
    return torch.stack([grad.norm() for grad in gradient.values()]).norm().item()
