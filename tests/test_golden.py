"""Five steps from the journal in tests/golden, on three layouts, against a text golden and so against each other.

Not covered: sampling (the journal stands for it) and kernels other than this CPU's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
TAGS = ("loss", "confidence/log_mean", "optimizer/gradient_norm")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(1, ()), (2, ("--tensor-model-parallel-size=2",)), (2, ("--pipeline-model-parallel-size=2",))],
    ids=["tp1", "tp2", "pp2"],
)
def test_five_steps(ranks: int, layout: tuple[str, ...], tmp_path: Path) -> None:
    """1e-5 at step 1; by step 5 Adam has made rounding count, 1e-3."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    flags = (GOLDEN / "flags.txt").read_text().split()
    replay = (f"--replay-rollouts={GOLDEN / 'journal'}", f"--output-dir={tmp_path / 'run'}")
    done = subprocess.run(
        [*launch, "-m", "megatron_rlsc", *flags, *replay, *layout], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr

    made, golden = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "run" / "metrics.jsonl", GOLDEN / "golden.jsonl")
    )
    tolerances = (1e-5, 1e-4, 1e-3, 1e-3, 1e-3)
    for tolerance, row, expected in zip(tolerances, made, golden, strict=True):
        for tag in TAGS:
            assert row[tag] == pytest.approx(expected[tag], rel=tolerance), (row["step"], tag)
