"""vocab_parallel_logprobs alone, against log_softmax in float64.

Not covered: bfloat16, and the memory that chunks save.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from world import World

from megatron_rlsc.policy.logprobs import vocab_parallel_logprobs

TOKENS, HIDDEN = 11, 6


def inputs(vocab_size: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, h], weight [vocab, h], targets [n], and the gradient [n] that comes back to the log-probabilities."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = scale * torch.randn(vocab_size, HIDDEN, generator=generator)
    targets = torch.randint(vocab_size, (TOKENS,), generator=generator)
    targets[0], targets[-1] = 0, vocab_size - 1
    return hidden, weight, targets, torch.randn(TOKENS, generator=generator)


def exact(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    table = (hidden @ weight.t() / temperature).log_softmax(-1)
    logprobs = table.gather(1, targets[:, None])[:, 0]
    entropy = torch.special.entr(table.exp()).sum(-1)
    grad_hidden, grad_weight = torch.autograd.grad(logprobs, (hidden, weight), upstream.double())
    return logprobs.detach(), entropy.detach(), grad_hidden, grad_weight


def on_one_shard(
    vocab_size: int, rows: int, padding: float, scale: float, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's answers; `rows` of the weight are its own, those past the vocabulary hold `padding`."""
    hidden, weight, targets, upstream = inputs(vocab_size, scale)
    padded = torch.cat([weight, torch.full((rows * dist.get_world_size() - vocab_size, HIDDEN), padding)])
    hidden.requires_grad_()
    shard = padded[dist.get_rank() * rows :][:rows].clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        shard,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        chunk_tokens=chunk_tokens,
    )
    assert not entropy.requires_grad
    grad_hidden, grad_shard = torch.autograd.grad(logprobs, (hidden, shard), upstream)
    return logprobs.detach(), entropy, grad_hidden, grad_shard


def check_close(found: Tensor, expected: Tensor) -> None:
    """1e-5, of the largest entry where that is more than 1."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def check(world: World, ranks: int, vocab_size: int, rows: int, **case: float) -> None:
    case = {"padding": 100.0, "scale": 1.0, "temperature": 0.5, "chunk_tokens": 4} | case
    expected = exact(*inputs(vocab_size, case["scale"]), case["temperature"])
    order = ("padding", "scale", "temperature", "chunk_tokens")
    answers = world.run(ranks, on_one_shard, vocab_size, rows, *(case[name] for name in order))
    for logprobs, entropy, grad_hidden, _ in answers:
        check_close(logprobs, expected[0])
        check_close(entropy, expected[1])
        check_close(grad_hidden, expected[2])
    grad_weight = torch.cat([answer[3] for answer in answers])
    check_close(grad_weight[:vocab_size], expected[3])
    assert not grad_weight[vocab_size:].any(), "padding rows learn nothing"


@pytest.mark.parametrize("chunk_tokens", [1, 4, TOKENS, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_chunk_over_any_shards(ranks: int, chunk_tokens: int, world: World) -> None:
    """4 ranks of 8 rows hold 29 words and 3 of padding; 2 ranks of 16 the same; 11 tokens are chunks of 4, 4 and 3."""
    check(world, ranks, vocab_size=29, rows=32 // ranks, chunk_tokens=chunk_tokens)


def test_without_padding(world: World) -> None:
    check(world, 2, vocab_size=32, rows=16)


@pytest.mark.parametrize("padding", [0.0, -1e4, 1e30, math.inf, math.nan])
def test_ranks_that_hold_padding_alone(padding: float, world: World) -> None:
    """11 words: 8 on rank 0, 3 on rank 1, none on ranks 2 and 3. What padding holds, even NaN, is never read."""
    check(world, 4, vocab_size=11, rows=8, padding=padding)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_temperature(temperature: float, world: World) -> None:
    """At 0.05 logits lie near 100 and entropies near 0, which no difference of large numbers would give."""
    check(world, 2, vocab_size=29, rows=16, temperature=temperature)


def test_a_certain_distribution_has_log_probability_and_entropy_zero(world: World) -> None:
    """One word, and padding: log 1 = 0 on every token."""
    check(world, 2, vocab_size=1, rows=4)


def large_logits() -> tuple[Tensor, Tensor]:
    """hidden 1, weights of 2 words a rank: logits 1e4 and 0 on rank 0, 1e4 and -1e4 on rank 1."""
    weight = torch.tensor([[[1e4], [0.0]], [[1e4], [-1e4]]])[dist.get_rank()]
    return vocab_parallel_logprobs(
        torch.ones(3, 1),
        weight,
        torch.tensor([0, 1, 3]),
        temperature=1.0,
        vocab_size=4,
        group=dist.group.WORLD,
        chunk_tokens=2,
    )


def test_logits_whose_exp_overflows(world: World) -> None:
    """p = 1/2, 0, 1/2, 0: log p = -log 2, -1e4 - log 2, -2e4 - log 2 of words 0, 1 and 3; entropy log 2."""
    log2 = math.log(2)
    for logprobs, entropy in world.run(2, large_logits):
        assert logprobs.tolist() == pytest.approx([-log2, -1e4 - log2, -2e4 - log2], rel=1e-6, abs=1e-3)
        assert entropy.tolist() == pytest.approx([log2] * 3, abs=2e-3)
