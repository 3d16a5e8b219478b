"""`python -m megatron_rlsc`, one process a rank: reads the settings, then runs; says plainly what a user got wrong."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from megatron_rlsc.config import parse_config


def main() -> None:
    """Exit code 0 when the run is done, 2 after a clear error. `--help` imports no torch."""
    first_rank = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_config(console_outputs=first_rank)
        from megatron_rlsc.train import run  # torch and megatron, after --help has been answered

        run(config)
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_explained(error):
            raise
        # Every rank may find the same mistake; one of them says it.
        if first_rank:
            print(f"\nrlsc: error: {error}\n", file=sys.stderr, flush=True)
        sys.exit(2)


def _is_explained(error: BaseException) -> bool:
    """Whether the message was written for the user: it was raised by this package's own code, not under it."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(origin).is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
    main()
