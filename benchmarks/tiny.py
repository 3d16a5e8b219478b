"""What the newcomer's run gains, and how long it takes, over seeds, layouts and losses: benchmarks/tiny.md.

python benchmarks/tiny.py --sidecar-python .venv-sidecar/bin/python
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from provenance import describe

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "TP=2, L2, seed 1": ["--seed", "1"],
    "TP=2, L2, seed 2": ["--seed", "2"],
    "TP=2, L2, seed 3": ["--seed", "3"],
    "PP=2, L2, seed 1": ["--seed", "1", "--pipeline-model-parallel-size", "2"],
    "DP=2, L2, seed 1": ["--seed", "1", "--tensor-model-parallel-size", "1"],
    "TP=2, L1, seed 1": ["--seed", "1", "--alpha", "0"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    sidecar_python: Path = ROOT / ".venv-sidecar/bin/python"
    """Python of the environment that has vLLM."""
    output: Path = ROOT / "benchmarks/tiny.md"
    """The table."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    rows = [measure(name, flags, args.sidecar_python) for name, flags in RUNS.items()]
    args.output.write_text(page(rows))
    print(args.output.read_text())


def measure(name: str, flags: list[str], sidecar_python: Path) -> str:
    """Runs one, and returns its row of the table."""
    output = ROOT / "runs/benchmark-tiny" / name.replace(", ", "-").replace(" ", "-")
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    flags = ["--trainer-python", sys.executable, "--sidecar-python", str(sidecar_python), *flags]
    flags += ["--output-dir", str(output), "--overwrite"]
    subprocess.run(["bash", ROOT / "examples/run_rlsc_tiny.sh", *flags], check=True)
    minutes = (time.perf_counter() - start) / 60
    summary = json.loads((output / "summary.json").read_text())
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [sum(step[f"time/{phase}"] for step in steps) / len(steps) for phase in ("rollout", "train", "sync")]
    base, rlsc = summary["base"], summary["rlsc"]
    return (
        f"| {name} | {base['greedy']:.1f} -> {rlsc['greedy']:.1f} | {base['sampled']:.1f} -> {rlsc['sampled']:.1f} "
        f"| {summary['steps']} | {summary['worst_logprob_difference']:.1e} "
        f"| {seconds[0]:.1f} / {seconds[1]:.1f} / {seconds[2]:.2f} | {minutes:.1f} |\n"
    )


def page(rows: list[str]) -> str:
    """The table with where and when it was made."""
    return (
        "# The newcomer's run\n\n"
        "Made by `python benchmarks/tiny.py`, which runs `examples/run_rlsc_tiny.sh` once a row: 20 steps of 32 "
        "questions x 16 responses, no label. Accuracy in percent on 500 held-out problems, base -> trained. "
        "Difference: the largest of a token's log-probability between vLLM and the trainer, over all steps.\n\n"
        f"{describe('torch', 'megatron-core')}. Minutes: from the command to the table, environments ready.\n\n"
        "| run | greedy | sampled at T=0.5 | steps | difference | seconds a step: rollout / train / sync | minutes |\n"
        "|---|---|---|---|---|---|---|\n" + "".join(rows)
    )


if __name__ == "__main__":
    main()
