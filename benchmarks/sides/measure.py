"""Seconds of a call, and its peak of memory above weights and moments, in the same way for every side."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    seconds: float
    cpu: float
    """Seconds of all threads: as many, where a single one had a core to itself."""
    peak: int
    """Bytes."""


def measure(call: Callable[[], T], parameters: Sequence[Any], device: str) -> tuple[T, Cost]:
    """What `call` returns, and what it cost.

    The peak is what the call takes beyond what there was before it, and gradients: some sides hold a buffer for them
    between steps, others make them anew.
    """
    held = gradient_bytes(parameters)
    before = start(device)
    begun, cpu = time.perf_counter(), time.process_time()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    cost = Cost(seconds=seconds, cpu=cpu, peak=highest(device) - before + held)
    give_back()  # while this process waits, others work
    return result, cost


def start(device: str) -> int:
    """Bytes in use; the highest so far is forgotten."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def give_back() -> None:
    """Freed memory that glibc keeps: what is taken of it again would not be seen."""
    ctypes.CDLL(None).malloc_trim(0)


def highest(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def gradient_bytes(parameters: Sequence[Any]) -> int:
    """Of gradients that are there; the optimizer's may be a view of Megatron's."""
    gradients = [getattr(parameter, name, None) for parameter in parameters for name in ("grad", "main_grad")]
    found = {gradient.data_ptr(): gradient.nbytes for gradient in gradients if gradient is not None}
    return sum(found.values())
