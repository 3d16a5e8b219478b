"""What a run has gained: writes summary.json from two measurements and the run's metrics, and prints the table."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    base: Path
    """What tools/evaluate.py measured of the base."""
    rlsc: Path
    """And of the exported model."""
    metrics: Path
    """The run's metrics.jsonl."""
    output: Path
    """summary.json."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    before, after = (json.loads(path.read_text()) for path in (args.base, args.rlsc))
    steps = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    if not steps:
        sys.exit(f"summarize_run: error: {args.metrics} has no step in it")
    summary = {
        "base": model_summary(before),
        "rlsc": model_summary(after),
        "steps": steps[-1]["step"],
        "pushes": int(steps[-1]["sync/pushes"]),
        "worst_logprob_difference": max(step["rollout/logprob_difference"] for step in steps),
    }
    args.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(table(before, after))
    print(
        f"{summary['steps']} steps without a label; {summary['pushes']} pushes into the sampler, whose "
        f"log-probabilities were never off by more than {summary['worst_logprob_difference']:.1e}\n{args.output}"
    )


def model_summary(measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "greedy": measured["greedy"]["accuracy"],
        "sampled": measured["sampled"]["accuracy"],
        "problems": measured["problems"],
        "weights_sha256": measured["weights_sha256"],
    }


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Accuracy, length and cut responses, base and trained."""
    head = f"{after['problems']} problems of {Path(after['data_path']).name}"
    rows = [f"\n{head}", f"{'':<26}{'base':>8}{'rlsc':>8}{'gain':>8}"]
    for kind, name in (("greedy", "greedy"), ("sampled", f"sampled at T={after['temperature']}")):
        for figure, unit in (("accuracy", "right, %"), ("response_length", "tokens"), ("truncated", "cut, %")):
            old, new = before[kind][figure], after[kind][figure]
            gain = f"{new - old:>+8.1f}" if figure == "accuracy" else ""
            rows.append(f"{name if figure == 'accuracy' else '':<17}{unit:<9}{old:>8.1f}{new:>8.1f}{gain}".rstrip())
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
