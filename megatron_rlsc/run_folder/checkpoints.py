"""A run's checkpoints as folders: which there are, which is the one to go on from, which may go. No torch."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_rlsc.conversion.folders import STEP_PREFIX, latest_checkpoint, step_dir


def steps_on_disk(folder: Path) -> list[int]:
    """Steps whose checkpoint was finished, in order."""
    finished = (path.parent.name for path in folder.glob(f"{STEP_PREFIX}*/metadata.json"))
    numbers = (name.removeprefix(STEP_PREFIX) for name in finished)
    return sorted(int(number) for number in numbers if number.isdigit())


def candidates(folder: Path, *, warn: Callable[[str], None]) -> Iterator[Path]:
    """What a run can go on from: the checkpoint that is named the latest, then the ones before it, newest first.

    Where the name cannot be read, or is of a checkpoint that was never finished, `warn` hears of it, and all that there
    are follow.
    """
    older = list(reversed(steps_on_disk(folder)))
    try:
        latest = latest_checkpoint(folder)
    except ValueError as error:
        warn(f"{error}; the checkpoints beside it are tried, newest first")
    else:
        yield latest
        name = latest.name.removeprefix(STEP_PREFIX)
        older = [step for step in older if name.isdigit() and step < int(name)]
    for step in older:
        yield step_dir(folder, step)


def prune(folder: Path, *, keep_last: int, keep_best: str, metrics: Path, spared: Sequence[int] = ()) -> None:
    """Deletes all checkpoints but the newest `keep_last`, the best and the spared ones. A half-deleted one has another
    name.

    Args:
        folder: of the checkpoints.
        keep_last: 0 deletes none.
        keep_best: a figure of `metrics`, highest first; with a minus before it, lowest first.
        metrics: JSON lines, one a step.
        spared: of each of these steps, the newest checkpoint that is not after it stays.
    """
    if keep_last == 0:
        return
    steps = steps_on_disk(folder)
    kept = set(steps[-keep_last:]) | best_of(steps, keep_best, metrics)
    for spare in spared:
        kept |= set([step for step in steps if step <= spare][-1:])
    for step in steps:
        if step not in kept:
            path = step_dir(folder, step)
            path.rename(deleted(path))
    sweep(folder)


def best_of(steps: list[int], figure: str, metrics: Path) -> set[int]:
    """The step whose figure is best; of equal ones the newest. None without a figure, or where no step has it."""
    if not figure or not metrics.is_file():
        return set()
    name, sign = figure.removeprefix("-"), -1 if figure.startswith("-") else 1
    values: dict[int, float] = {}
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # a line that is being written
            row = json.loads(line)
            if name in row and row["step"] in steps:
                values[row["step"]] = sign * row[name]
    return {max(values, key=lambda step: (values[step], step))} if values else set()


def sweep(folder: Path) -> None:
    """Deletes what a save or a deletion that was killed has left."""
    for path in [*folder.glob(f".{STEP_PREFIX}*.partial*"), *folder.glob(f".{STEP_PREFIX}*.deleted")]:
        shutil.rmtree(path, ignore_errors=True)


def deleted(path: Path) -> Path:
    """The name under which a checkpoint waits to be deleted."""
    return path.with_name(f".{path.name}.deleted")
