"""What a run has gained: writes summary.json from two evaluations and the run's metrics, and prints the tables."""

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
    """--output of tools/evaluate.py for the base: one file of problems, greedy and at one temperature."""
    rlsc: Path
    """And for the exported model."""
    metrics: Path
    """The run's metrics.jsonl."""
    output: Path
    """summary.json."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    from megatron_rlsc.evaluation.benchmarks import read_benchmarks  # after --help
    from megatron_rlsc.evaluation.report import find_results, table

    steps = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    if not steps:
        sys.exit(f"summarize_run: error: {args.metrics} has no step in it")
    try:
        text = table(find_results(args.base), find_results(args.rlsc), read_benchmarks())
        summary = {
            "base": model_summary(args.base),
            "rlsc": model_summary(args.rlsc),
            "steps": steps[-1]["step"],
            "pushes": int(steps[-1]["sync/pushes"]),
            "worst_logprob_difference": max(map(logprob_difference, steps)),
        }
    except ValueError as error:
        sys.exit(f"summarize_run: error: {error}")
    args.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{text}")
    print(
        f"{summary['steps']} steps without a label; {summary['pushes']} pushes into the sampler, whose "
        f"log-probabilities were never off by more than {summary['worst_logprob_difference']:.1e}\n{args.output}"
    )


def logprob_difference(step: dict[str, float]) -> float:
    """Of a step's sampler from its trainer, of the same weights: under --rollout-lead the probe's, since the responses
    are of weights that the trainer has left behind."""
    return step["sync/probe_difference" if "rollout/log_ratio" in step else "rollout/logprob_difference"]


def model_summary(folder: Path) -> dict[str, Any]:
    """Accuracy, greedy and sampled, and what was measured."""
    from megatron_rlsc.evaluation.report import find_results

    found = find_results(folder)
    accuracies = {how if how == "greedy" else "sampled": result.accuracy.value for (_, how), result in found.items()}
    (name, how), first = next(iter(found.items()))
    settings = json.loads((folder / name / how / "settings.json").read_text())
    return accuracies | {"problems": first.problems, "weights_sha256": settings["weights_sha256"]}


if __name__ == "__main__":
    main()
