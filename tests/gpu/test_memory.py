"""What memory grows with: bounds in bytes, computed from shapes, against what the allocator has seen.

Not covered: fragmentation, and what NCCL and CUDA itself take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from hf import MODELS
from policies import build_policy, one_batch
from torch import Tensor

from megatron_rlsc.policy.logprobs import vocab_parallel_logprobs
from megatron_rlsc.policy.parallel import Parallel

VOCAB, HIDDEN, CHUNK = 151936, 1536, 1024
"""Qwen2.5-1.5B's, and the default of logprob_chunk_tokens."""
SLACK = 256 * 2**20
"""cuBLAS keeps workspaces in the same allocator."""


def peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that were allocated at one time, beyond those before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def head(tokens: int, device: torch.device) -> tuple[int, Tensor, Tensor]:
    """The peak of the log-probability head forwards and backwards, and its two gradients' sums."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, device=device).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(VOCAB, HIDDEN, generator=generator, device=device)).bfloat16().requires_grad_()
    targets = torch.randint(VOCAB, (tokens,), generator=generator, device=device)

    def run() -> None:
        logprobs, _ = vocab_parallel_logprobs(
            hidden,
            weight,
            targets,
            temperature=0.5,
            vocab_size=VOCAB,
            group=dist.group.WORLD,
            chunk_tokens=CHUNK,
        )
        logprobs.sum().backward()

    found = peak(run, device)
    assert hidden.grad is not None and weight.grad is not None
    return found, hidden.grad.float().sum(), weight.grad.float().sum()


def test_the_log_prob_head(gpu: torch.device) -> None:
    """A chunk's logits, [1024, 151936], are made in bfloat16 and held in float32, with as much for their sums: 8 bytes
    an element at most. The weight's gradient adds up in float32, is fed by a bfloat16 product and handed on in
    bfloat16: 8 bytes. The rest is a token's: its hidden state's gradient, and a few numbers. All logits
    of 16384 tokens, which no one makes, would be 10 GB in float32 alone."""
    few, many = 4096, 16384
    fixed = 8 * CHUNK * VOCAB + 8 * VOCAB * HIDDEN + SLACK
    per_token = 8 * HIDDEN + 64
    peaks = {}
    for tokens in (few, many):
        peaks[tokens], *sums = head(tokens, gpu)
        assert all(torch.isfinite(total) for total in sums)
        assert peaks[tokens] < fixed + tokens * per_token
    assert peaks[many] - peaks[few] < (many - few) * per_token + SLACK
    assert peaks[many] < 4 * many * VOCAB / 2, "half of one float32 copy of all logits"


def test_attention_grows_with_the_document_not_with_its_square(
    gpu: torch.device, transformer_engine: None, parallel: Parallel
) -> None:
    """One document of 32768 tokens, forwards and backwards through two layers of the 1.5B's width. The scores of one
    layer would be 12 x 32768^2 in bfloat16, 26 GB; all activations of a layer are below 34 hidden + 8 intermediate
    bytes a token (Korthikanti et al. 2022, section 4.1, without dropout; a gated MLP holds three matrices)."""
    wide = MODELS["1.5B"]
    model = replace(wide, shape=replace(wide.shape, num_hidden_layers=2, vocab_size=1024, padded_vocab_size=1024))
    for layout in ("packed", "padded"):
        policy = build_policy(model, "transformer_engine", parallel, layout=layout)  # type: ignore[arg-type]
        length = 32768
        sample = replace(
            model.samples()[0],
            prompt_token_ids=tuple(i % 1024 for i in range(length - 64)),
            response_token_ids=tuple(range(64)),
            rollout_logprobs=(0.0,) * 64,
        )
        batch = one_batch([sample], parallel)

        def run(policy=policy, batch=batch) -> None:  # type: ignore[no-untyped-def]
            policy.forward_backward([batch], 1, lambda logprobs, lengths, rows: torch.ones_like(logprobs))

        run()  # gradients' buffers and workspaces are there after the first
        layers, hidden, intermediate = 2, wide.shape.hidden_size, wide.shape.intermediate_size
        bound = (layers + 1) * length * (34 * hidden + 8 * intermediate) + SLACK
        scores = 2 * wide.shape.num_attention_heads * length**2
        assert bound < scores
        assert peak(run, gpu) < bound
        del policy, batch, run
        torch.cuda.empty_cache()
