"""A run in the terminal, while it goes on or afterwards: step, phases, tokens a second, health, time left.

python tools/watch.py runs/rlsc-tiny            until it ends, or Ctrl-C
python tools/watch.py runs/rlsc-tiny --once     as it is now, for a log

Reads the run's folder and nothing else: from any machine that sees it, and as often as one likes. Needs the `report`
extra. Exit codes: 0, and 2 where there is no run.
"""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    """The run's --output-dir."""
    once: bool = False
    """Print once and exit."""
    interval: float = 2.0
    """Seconds between two looks."""
    rows: int = 8
    """Steps in the table, the last ones."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a log may be ASCII
    from megatron_rlsc.reporting.run import read_run  # after --help

    try:
        from rich.console import Console
        from rich.live import Live

        from megatron_rlsc.reporting.terminal import view
    except ModuleNotFoundError as error:
        sys.exit(f"watch: error: no {error.name}: pip install 'megatron-rlsc[report]'")
    try:
        run = read_run(args.run)
        if args.once:
            Console().print(view(run, rows=args.rows))
            return
        with Live(view(run, rows=args.rows), auto_refresh=False) as live:
            while run.state in ("running", "unknown"):
                time.sleep(args.interval)
                run = read_run(args.run)
                live.update(view(run, rows=args.rows), refresh=True)
    except KeyboardInterrupt:
        return
    except (ValueError, OSError) as error:
        print(f"watch: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
