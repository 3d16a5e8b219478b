"""The key of sidecars that others run: from a file or the environment, so that no command line and no log has it."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_rlsc.rollout.wire import KEY_VARIABLE


def external_key(file: Path | None) -> str:
    """The key in `file`, or in RLSC_ROLLOUT_KEY without one. Raises ValueError where there is none, and for a file that
    others may read."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key:
            raise ValueError(f"--rollout-urls needs the key of those sidecars: --rollout-key-file, or {KEY_VARIABLE}")
        return key
    try:
        mode = file.stat().st_mode & 0o777
        key = file.read_text().strip()
    except OSError as error:
        raise ValueError(f"--rollout-key-file {file}: {error.strerror}") from None
    if mode & 0o077:
        raise ValueError(f"--rollout-key-file {file} has mode {mode:04o}, others may read the key: chmod 600 {file}")
    if not key:
        raise ValueError(f"--rollout-key-file {file} is empty")
    return key
