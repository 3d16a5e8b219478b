"""`python -m megatron_rlsc`, one process a rank: reads the settings, then runs; says plainly what a user got wrong."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from megatron_rlsc.interrupt import TERMINATED, Interruption
from megatron_rlsc.recipe import parse_config

SPEAK_SECONDS = 3
"""What the first rank is given to say an error that all have found."""


def main() -> None:
    """Exit code 0 when the run is done or was told to stop, 143 when SIGTERM has ended it, 2 after a clear error.
    `--help` imports no torch."""
    first_rank = os.environ.get("RANK", "0") == "0"
    try:
        config = parse_config(console_outputs=first_rank)
        folder, grace = config.train.output_dir, config.train.grace_seconds
        with Interruption(folder, grace_seconds=grace, watches_folder=first_rank) as stop:
            from megatron_rlsc.run import run  # torch and megatron, after --help has been answered

            done = run(config, stop)
        if stop.at_once and not done:
            sys.exit(TERMINATED)
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_explained(error):
            raise
        _tell_torchrun(str(error))
        if first_rank:
            print(f"\nrlsc: error: {error}\n", file=sys.stderr, flush=True)
        else:  # every rank may find the same mistake: torchrun ends them all when the first of them exits
            time.sleep(SPEAK_SECONDS)
        sys.exit(2)


def _is_explained(error: BaseException) -> bool:
    """Whether the message was written for the user: it was raised by this package's own code, not under it."""
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(origin).is_relative_to(Path(__file__).parent)


def _tell_torchrun(message: str) -> None:
    """Leaves the message where torchrun looks for it, so that it also stands in the table that torchrun ends with.

    The format is torch.distributed.elastic.multiprocessing.errors.ErrorHandler's.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        details = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": details}))


if __name__ == "__main__":
    main()
