"""vocab_parallel_logprobs alone, against log_softmax in float64."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from live_bytes import counted, peak
from torch import Tensor
from world import World

from megatron_rlsc.policy import logprobs as logprobs_module
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


RESPONSES = (3, 5, 1, 2)
"""Tokens of each, TOKENS in all."""
UPSTREAM = (0.5, -2.0, 0.0, 1e-9)
"""The gradient that comes back to every token of each; the last as of a response that weighs next to nothing."""


def with_main_grad(vocab_size: int, rows: int, chunk_tokens: int, brought_back: float) -> tuple[Tensor, ...]:
    """This rank's answers where gradients are foreseen, and come back `brought_back` times as large."""
    hidden, weight, targets, _ = inputs(vocab_size, 1.0)
    padded = torch.cat([weight, torch.full((rows * dist.get_world_size() - vocab_size, HIDDEN), math.nan)])
    hidden.requires_grad_()
    shard = padded[dist.get_rank() * rows :][:rows].clone().requires_grad_()
    shard.main_grad = torch.ones_like(shard)  # of an earlier micro-batch
    asked: list[tuple[int, int]] = []
    upstream = torch.tensor(UPSTREAM).repeat_interleave(torch.tensor(RESPONSES))

    def foresee(logprobs: Tensor, tokens: slice, responses: slice) -> Tensor:
        asked.append((responses.start, responses.stop))
        assert tokens.start == sum(RESPONSES[: responses.start]) and tokens.stop == sum(RESPONSES[: responses.stop])
        assert len(logprobs) == tokens.stop - tokens.start and (logprobs < 0).all()
        return upstream[tokens]

    logprobs, entropy = vocab_parallel_logprobs(
        hidden,
        shard,
        targets,
        temperature=0.5,
        vocab_size=vocab_size,
        group=dist.group.WORLD,
        chunk_tokens=chunk_tokens,
        responses=RESPONSES,
        foresee=foresee,
    )
    logprobs.backward(brought_back * upstream)
    assert shard.grad_added_to_main_grad
    assert hidden.grad is not None and shard.grad is not None and shard.grad.shape == shard.shape
    return logprobs.detach(), entropy, hidden.grad, shard.main_grad, torch.tensor(asked)


@pytest.mark.parametrize(
    ("chunk_tokens", "asked"),
    [
        (1, [(2, 3)]),
        (2, [(2, 3), (3, 4)]),
        (4, [(0, 1), (2, 4)]),  # the response of 5 tokens is cut
        (8, [(0, 2), (2, 4)]),
        (1000, [(0, 4)]),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_that_are_foreseen(ranks: int, chunk_tokens: int, asked: list[tuple[int, int]], world: World) -> None:
    """Of whole responses that fit a chunk; the weight's goes on top of what is there. 13 words of 16 rows: the last of
    four ranks holds one."""
    hidden, weight, targets, _ = inputs(13, 1.0)
    upstream = torch.tensor(UPSTREAM).repeat_interleave(torch.tensor(RESPONSES))
    expected = exact(hidden, weight, targets, upstream, 0.5)
    answers = world.run(ranks, with_main_grad, 13, 16 // ranks, chunk_tokens, 1.0)
    for logprobs, entropy, grad_hidden, _, foreseen in answers:
        check_close(logprobs, expected[0])
        check_close(entropy, expected[1])
        check_close(grad_hidden, expected[2])
        assert foreseen.tolist() == [list(pair) for pair in asked]
    main_grad = torch.cat([answer[3] for answer in answers])
    check_close(main_grad[:13] - 1, expected[3])
    assert (main_grad[13:] == 1).all()


def test_a_gradient_that_is_not_the_foreseen_one_is_an_error(world: World) -> None:
    with pytest.raises(Exception, match="not what was foreseen"):
        world.run(1, with_main_grad, 13, 16, 1000, 2.0)


def in_bfloat16(words: int, gradients: torch.dtype, foreseen: bool) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's answers, of a weight whose products are taken `words` at a time."""
    with patch.object(logprobs_module, "WORDS", words):  # the process is other tests' too
        return _in_bfloat16(gradients, foreseen)


def _in_bfloat16(gradients: torch.dtype, foreseen: bool) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets, upstream = inputs(26, 1.0)
    hidden = hidden.bfloat16().requires_grad_()
    shard = weight.bfloat16()[dist.get_rank() * 13 :][:13].requires_grad_()
    shard.main_grad = torch.ones_like(shard, dtype=gradients)
    logprobs, _ = vocab_parallel_logprobs(
        hidden,
        shard,
        targets,
        temperature=0.5,
        vocab_size=26,
        group=dist.group.WORLD,
        chunk_tokens=4,
        responses=(1,) * TOKENS,
        foresee=(lambda logprobs, tokens, responses: upstream[tokens]) if foreseen else None,
    )
    logprobs.backward(upstream)
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    return logprobs.detach(), hidden.grad, shard.main_grad - 1


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [5, 13])
def test_bfloat16(words: int, gradients: torch.dtype, foreseen: bool, world: World) -> None:
    """13 words a rank, at once or in pieces of 5: the numbers of bfloat16 logits, summed in float32."""
    hidden, weight, targets, upstream = inputs(26, 1.0)
    expected = exact(hidden.bfloat16(), weight.bfloat16(), targets, upstream, 0.5)
    answers = world.run(2, in_bfloat16, words, gradients, foreseen)
    for logprobs, grad_hidden, _ in answers:
        torch.testing.assert_close(logprobs.double(), expected[0], rtol=0.02, atol=0.05)
        torch.testing.assert_close(grad_hidden.double(), expected[2], rtol=0.02, atol=0.05)
    main_grad = torch.cat([answer[2] for answer in answers]).double()
    torch.testing.assert_close(main_grad, expected[3], rtol=0.02, atol=0.05)


def peak_of_a_pass(foreseen: bool) -> int:
    """Bytes, of 2048 tokens of 32 entries and 4000 words in chunks of 256, beyond the weight and its gradient."""
    hidden, weight = torch.randn(2048, 32, requires_grad=True), torch.randn(4000, 32, requires_grad=True)
    weight.main_grad = torch.zeros_like(weight)

    def foresee(logprobs: Tensor, tokens: slice, responses: slice) -> Tensor:
        return torch.ones_like(logprobs)

    def run() -> None:
        logprobs, _ = vocab_parallel_logprobs(
            hidden,
            weight,
            torch.zeros(2048, dtype=torch.int64),
            temperature=0.5,
            vocab_size=4000,
            group=dist.group.WORLD,
            chunk_tokens=256,
            responses=(128,) * 16,
            foresee=foresee if foreseen else None,
        )
        logprobs.sum().backward()

    run()
    with counted():
        before = peak(lambda: None)
        return peak(run) - before


@pytest.mark.parametrize("foreseen", [False, True])
def test_memory_is_that_of_a_chunk_and_of_the_hidden_states(foreseen: bool, world: World) -> None:
    """A chunk's logits are 256 x 4000 x 4 = 4.1 MB, what is computed of 64 of its rows half of that, the
    gradient of the hidden states 0.3 MB; all logits would be 33 MB, and another copy of a chunk's 4.1 MB."""
    (found,) = world.run(1, peak_of_a_pass, foreseen)
    chunk, hidden = 256 * 4000 * 4, 2048 * 32 * 4
    assert chunk < found < 1.5 * chunk + 2 * hidden
