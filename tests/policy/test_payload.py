"""What rank 0 hands to the others may take it longer than a collective is given."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

CODE = """
import time
from datetime import timedelta
from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.policy.parallel import init_parallel
import torch, torch.distributed as dist

parallel = init_parallel(ParallelConfig(), seed=1)
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3))  # a busy machine may take longer to make the group
for payload in (b"", b"late", b"at once"):
    if payload == b"late" and parallel.rank == 0:
        time.sleep(5)
    assert parallel.broadcast_bytes(payload if parallel.rank == 0 else None) == payload
if parallel.rank == 1:
    time.sleep(5)
try:
    dist.all_reduce(torch.ones(1))
    raise SystemExit("a collective waited for longer than it may")
except RuntimeError:
    print("as it should be", flush=True)
"""


def test_rank_zero_may_be_late(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, str(tmp_path / "late.py")],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "as it should be" in done.stdout, done.stderr[-3000:]
    assert time.monotonic() - started > 5
