"""What a log's end says. A real one is in test_sidecar.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlsc.rollout.sidecar_log import REMEDY, last_words


@pytest.mark.parametrize(
    "line",
    [  # vllm 0.32 and torch 2.13, word for word
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when",
        "(8192), (4.50 GiB KV cache is needed, which is larger than the available KV cache memory (1.20 GiB). Based on",
        "ValueError: Free memory on device cuda:0 (10.1/79.2 GiB) is less than desired GPU memory utilization",
        "ValueError: Available memory on node 0 (1.0/23.0 GiB) is less than desired CPU memory utilization",
        "ValueError: Available memory on node 0 (1/2 GiB) on kv cache allocation is less than requested memory for kv",
        "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free",
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests.",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_too_little_memory_names_the_flags(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log"
    log.write_text(f'{line}\n  File "core.py", line 1, in run\n' + "Engine core initialization failed.\n" * 40)
    words = last_words(log, 0).splitlines()
    assert words == ["Engine core initialization failed."] * 30 + [REMEDY]
    for flag in ("gpu-memory-utilization", "max-num-seqs", "tensor-parallel-size", "kv-cache-gib"):
        assert f"--sidecar-{flag}" in REMEDY
    assert "--max-response-length" in REMEDY


def test_only_what_was_written_since_the_last_start_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("CUDA out of memory\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("(EngineCore pid=7) ERROR 11-21 12:00:00 [core.py:1]   File \"core.py\", line 1\nKeyError: 'x'\n")
    assert last_words(log, start) == "KeyError: 'x'"
