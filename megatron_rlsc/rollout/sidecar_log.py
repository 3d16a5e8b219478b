"""The end of a sidecar's log, for an error: without the frames of tracebacks, with the way out of too little memory."""

from __future__ import annotations

import re
from pathlib import Path

LINES_SHOWN = 30
_TRACEBACK_FRAME = re.compile(r"""(\(\w+ pid=\d+\) )?(ERROR \S+ \S+ \[\S+\] )?(  File "|    )""")

# vllm 0.32: v1/core/kv_cache_utils.py, v1/worker/{utils,gpu_model_runner,cpu_worker}.py; torch's own allocators.
_OUT_OF_MEMORY = re.compile(
    "No available memory for the cache blocks"
    "|larger than the available KV cache memory"
    "|less than desired (?:GPU|CPU) memory utilization"
    "|exceed the desired GPU memory utilization"
    "|less than requested memory for kv"
    "|not enough GPU memory"
    "|out of memory"
    "|can't allocate memory"
    "|Cannot allocate memory"
)
REMEDY = (
    "The sidecar has too little memory. On a GPU: raise --sidecar-gpu-memory-utilization where the KV cache is short "
    "of it, lower it where the GPU is shared; lower --sidecar-max-num-seqs or --max-response-length; raise "
    "--sidecar-tensor-parallel-size. On a CPU: --sidecar-kv-cache-gib is the size of the KV cache."
)


def last_words(path: Path, start: int) -> str:
    """The last lines of what was written after `start` bytes, and `REMEDY` where they tell of too little memory."""
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    # Each of vLLM's processes passes an error on with its own traceback: without their frames the cause is seen.
    shown = [line for line in lines if not _TRACEBACK_FRAME.match(line)][-LINES_SHOWN:]
    if any(_OUT_OF_MEMORY.search(line) for line in lines):
        shown.append(REMEDY)
    return "\n".join(shown)
