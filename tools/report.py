"""What a run did, on one page: a self-contained HTML file, of a run that is done, stopped or under way.

python tools/report.py runs/rlsc-tiny
python tools/report.py runs/rlsc-7b --base evaluation/base --rlsc evaluation/rlsc --output rlsc-7b.html

Reads what the run's folder has: config.toml, metrics.jsonl, rollouts/, held_out.jsonl, shown.jsonl, guard.jsonl,
evaluation/. Needs the `report` extra.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """The run's --output-dir."""
    output: Path | None = None
    """The HTML file; report.html in the run's folder by default."""
    base: Path | None = None
    """--output of tools/evaluate.py for the base model; evaluation/base in the run's folder by default."""
    rlsc: Path | None = None
    """And for the trained one; evaluation/rlsc by default."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    from megatron_rlsc.reporting.run import read_run  # after --help
    from megatron_rlsc.run_folder.names import EVALUATION, REPORT

    try:
        from megatron_rlsc.reporting.page import render_page, write_page
    except ModuleNotFoundError as error:
        sys.exit(f"report: error: no {error.name}: pip install 'megatron-rlsc[report]'")
    evaluation, output = args.run / EVALUATION, args.output or args.run / REPORT
    try:
        page = render_page(
            read_run(args.run), base=args.base or evaluation / "base", rlsc=args.rlsc or evaluation / "rlsc"
        )
        write_page(output, page)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(output)


if __name__ == "__main__":
    main()
