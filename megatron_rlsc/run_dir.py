"""A run's folder: what is in it, and who may write there."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rlsc.config import Config, dump_recipe

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ROLLOUTS = "rollouts"
CHECKPOINTS = "checkpoints"
EXPORT = "hf"
SIDECAR_LOG = "sidecar.log"


def open_run_dir(folder: Path, config: Config) -> None:
    """Makes the folder and writes the resolved config there. Rank 0 alone calls it, when all else has been checked.

    Raises ValueError where an earlier run is there and neither `resume` nor `overwrite` says what to do about it, or
    the folder is no run's. A run that failed before its first step left nothing to keep, and does not count.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / CONFIG).is_file():
            raise ValueError(f"--output-dir {folder} holds something that is no run (it has no {CONFIG}): name another")
        if config.train.overwrite or not (folder / METRICS).exists():
            shutil.rmtree(folder)
        elif not config.train.resume:
            raise ValueError(
                f"--output-dir {folder} holds a run already: --resume goes on with it, --overwrite deletes it, or name "
                f"another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(dump_recipe(config))
