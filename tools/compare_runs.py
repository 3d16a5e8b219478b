"""Runs beside each other, over the same held-out problems: a table of what each gained and cost, and curves.

python tools/compare_runs.py runs/controls/rlsc runs/controls/self-sft --base runs/controls/base --output comparison
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """--output-dirs of runs with --eval-interval, in the order in which they are shown."""
    base: Path | None = None
    """--output of tools/evaluate.py for the untrained model: its accuracies are lines across."""
    output: Path
    """OUTPUT.md and OUTPUT.png are written."""
    title: str = "Runs side by side"
    """Of OUTPUT.md."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        from megatron_rlsc.reporting.comparison import base_table, cost_table, draw, read_runs
    except ModuleNotFoundError as error:
        sys.exit(f"compare_runs: error: no {error.name}: pip install 'megatron-rlsc[report]'")
    from megatron_rlsc.disk import write_whole
    from megatron_rlsc.evaluation.report import find_results

    try:
        runs = read_runs(args.runs)
        base = {how: result for (_, how), result in find_results(args.base).items()} if args.base else {}
        page, picture = args.output.with_suffix(".md"), args.output.with_suffix(".png")
        page.parent.mkdir(parents=True, exist_ok=True)
        tables = [cost_table(runs), base_table(base)] if base else [cost_table(runs)]
        write_whole(page, "\n".join([f"# {args.title}\n", f"![curves]({picture.name})\n", *tables]).encode())
        draw(runs, base, picture)
    except (ValueError, OSError) as error:
        print(f"compare_runs: error: {error}", file=sys.stderr)
        sys.exit(2)
    print("\n".join(tables))
    print(page, picture, sep="\n")


if __name__ == "__main__":
    main()
