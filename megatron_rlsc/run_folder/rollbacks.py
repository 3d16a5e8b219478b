"""A run's rollbacks on disk: `rollbacks/01/`, ... each decided, carried out and then settled. No torch.

A rollback is decided when its rollback.json is there. What follows can be done again after a kill at any point: the
checkpoints after the good one go, and the rollouts and figures of the abandoned steps move into its folder.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_rlsc.conversion.folders import TRACKER, set_latest, step_dir
from megatron_rlsc.disk import write_whole
from megatron_rlsc.run_folder.checkpoints import deleted, steps_on_disk, sweep
from megatron_rlsc.run_folder.names import CHECKPOINTS, HELD_OUT, METRICS, ROLLBACKS, ROLLOUTS

RECORD, SETTLED = "rollback.json", "settled"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollback:
    """Why and where a run went back."""

    step: int
    """After which the collapse was seen."""
    to: int
    """The step that the run goes on from; 0 for the base."""
    rate: float
    """What the learning rate is multiplied by."""
    why: str


def read_rollbacks(run: Path) -> list[Rollback]:
    """Of a run's folder, in order."""
    paths = sorted((run / ROLLBACKS).glob(f"*/{RECORD}"))
    return [Rollback(**json.loads(path.read_text())) for path in paths]


def rate_scale(run: Path) -> float:
    """What all its rollbacks together multiply the learning rate by."""
    scale = 1.0
    for rollback in read_rollbacks(run):
        scale *= rollback.rate
    return scale


def newest_sound(run: Path, step: int) -> int:
    """The newest checkpoint that is not after `step`; 0, the base, where there is none."""
    return max((saved for saved in steps_on_disk(run / CHECKPOINTS) if saved <= step), default=0)


def roll_back(run: Path, rollback: Rollback) -> None:
    """Decides it, and carries it out."""
    folder = run / ROLLBACKS / f"{len(read_rollbacks(run)) + 1:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RECORD, json.dumps(dataclasses.asdict(rollback), indent=2).encode())
    settle(run)


def settle(run: Path) -> None:
    """Carries out what was decided when the run was killed; nothing, where all is done."""
    for folder in sorted((run / ROLLBACKS).glob("*")):
        if (folder / RECORD).is_file() and not (folder / SETTLED).exists():
            _carry_out(run, folder, Rollback(**json.loads((folder / RECORD).read_text())))
            write_whole(folder / SETTLED, b"")


def _carry_out(run: Path, folder: Path, rollback: Rollback) -> None:
    checkpoints = run / CHECKPOINTS
    if rollback.to:
        set_latest(checkpoints, rollback.to)
    else:
        (checkpoints / TRACKER).unlink(missing_ok=True)  # the run begins anew, with the base
    for step in steps_on_disk(checkpoints):
        if step > rollback.to:
            path = step_dir(checkpoints, step)
            shutil.rmtree(deleted(path), ignore_errors=True)
            path.rename(deleted(path))
    sweep(checkpoints)
    (folder / ROLLOUTS).mkdir(exist_ok=True)
    for path in (run / ROLLOUTS).glob("*-*.jsonl"):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) > rollback.to:
            path.rename(folder / ROLLOUTS / path.name)
    for name in (METRICS, HELD_OUT):
        if (run / name).is_file():
            lines = (run / name).read_text().splitlines()
            rows = [line for line in lines if json.loads(line)["step"] > rollback.to]
            write_whole(folder / name, "".join(f"{line}\n" for line in rows).encode())
