"""Of benchmarks/gpu.py: the matrix rate, the log-probability head alone, and what a step's time goes to."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any


def profile(step: Callable[[], object], device: str) -> list[tuple[str, int, float]]:
    """(kernel, calls, milliseconds) of one step, the longest first; on a CPU, torch's operators."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    cuda = device == "cuda"
    with record(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        step()
    rows = [
        (event.key, event.count, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3)
        for event in recorded.key_averages()
        # Of a GPU kernels alone, and no ranges that have names around them.
        if event.device_type == (DeviceType.CUDA if cuda else DeviceType.CPU)
        and not (cuda and getattr(event, "is_user_annotation", False))
    ]
    return sorted(rows, key=lambda row: -row[2])


def measure_kernels(head: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Any]:
    """FLOP/s of a plain matrix product, and the log-probability head alone."""
    import torch
    import torch.distributed as dist

    from megatron_rlsc.config import ModelConfig, ParallelConfig
    from megatron_rlsc.policy.logprobs import vocab_parallel_logprobs
    from megatron_rlsc.policy.parallel import init_parallel

    device = init_parallel(ParallelConfig(), seed=1).device
    size = 256 if args.tiny else 8192
    factors = torch.randn(2, size, size, device=device).bfloat16()
    rate = 2 * size**3 / seconds_of(lambda: factors[0] @ factors[1], args.device, times=20)

    tokens, hidden_size, vocabulary = (64, 32, 512) if args.tiny else head
    hidden = torch.randn(tokens, hidden_size, device=device).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, hidden_size, device=device)).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)

    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]

    def forward(response: int) -> torch.Tensor:
        logprobs, _ = vocab_parallel_logprobs(
            hidden,
            weight,
            targets,
            temperature=0.5,
            vocab_size=vocabulary,
            group=dist.group.WORLD,
            chunk_tokens=chunk,
            responses=[response] * (tokens // response),
            foresee=lambda logprobs, tokens, responses: -torch.ones_like(logprobs),
        )
        return logprobs

    def there_and_back(response: int) -> None:
        hidden.grad = None
        forward(response).sum().neg().backward()

    def without_gradient() -> None:
        with torch.no_grad():
            forward(chunk)

    chunk = min(ModelConfig().logprob_chunk_tokens, tokens // 2)
    forwards = seconds_of(without_gradient, args.device, times=3)
    short = seconds_of(partial(there_and_back, chunk), args.device, times=3)
    hidden.grad, before = None, 0
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    long = seconds_of(partial(there_and_back, 2 * chunk), args.device, times=3)
    return {
        "rate": rate,
        "head": [tokens, hidden_size, vocabulary],
        "head_forward": forwards,
        "head_short": short,
        "head_long": long,
        "head_flops": 6 * tokens * hidden_size * vocabulary,
        "head_peak": torch.cuda.max_memory_allocated() - before if args.device == "cuda" else 0,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "memory": torch.cuda.mem_get_info()[1] if args.device == "cuda" else 0,
    }


def seconds_of(call: Callable[[], object], device: str, *, times: int) -> float:
    """Of one call: the least of three rows of calls, after a first."""
    import torch

    def row() -> float:
        begun = time.perf_counter()
        for _ in range(times):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / times

    row()
    return min(row() for _ in range(3))
