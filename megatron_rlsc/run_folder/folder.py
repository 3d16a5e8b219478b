"""A run's folder: what is in it, whose it is while a run lives, and what a resumed run may not change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_rlsc.config import KEPT_BY_RESUME, Config
from megatron_rlsc.conversion.folders import TRACKER, is_megatron_checkpoint, trained_steps
from megatron_rlsc.conversion.hf import COMPANIONS
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.disk import (
    FULL,
    checkpoint_bytes,
    free_bytes,
    full_disk_explained,
    readable,
    used_bytes,
    write_whole,
)
from megatron_rlsc.interrupt import STOP
from megatron_rlsc.lock import locked
from megatron_rlsc.recipe import dump_recipe, load_recipe
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.run_folder.names import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EXPORT,
    EXPORTS,
    GUARD,
    HELD_OUT,
    INPUTS,
    LAUNCHER,
    LOCK,
    METRICS,
    PROFILE,
    REPORT,
    ROLLBACKS,
    ROLLOUTS,
    SHOWN,
    SIDECAR_LOGS,
    STATUS,
    SUMMARY,
    TENSORBOARD,
)

WRITTEN = (
    INPUTS,
    METRICS,
    HELD_OUT,
    SHOWN,
    GUARD,
    TENSORBOARD,
    PROFILE,
    ROLLOUTS,
    ROLLBACKS,
    CHECKPOINTS,
    EXPORT,
    EXPORTS,
    SIDECAR_LOGS,
    EVALUATION,
    SUMMARY,
    REPORT,
)
"""What is deleted to begin anew. `config.toml` marks the folder as a run's, and is replaced."""
WORTH_KEEPING = (METRICS, f"{CHECKPOINTS}/{TRACKER}", EXPORT)
"""A run that has none of these failed before its first step."""

ALIVE = "--output-dir {folder} belongs to a run that is alive, {{holder}}: end that one first, or name another folder"


ALL = sys.maxsize
"""Of the journal's steps after a checkpoint: all are what the resumed run would sample."""


@contextmanager
def open_run_dir(folder: Path, config: Config, model_dir: Path, shape: ModelShape) -> Iterator[int]:
    """Makes the folder this run's for as long as the block lasts, and writes its config there. Rank 0 alone calls it,
    when all else has been checked. Yields how many of the journal's steps after the checkpoint that a resumed run goes
    on from hold what it would sample itself: ALL; where its updates will differ 1, or with --rollout-lead the 2 that no
    later weights have made; 0 where its questions or its sampling differ.

    Raises ValueError, and changes nothing, where the folder is no run's; another live run writes to it; an earlier run
    is there and neither `resume` nor `overwrite` says what to do about it; `resume` would change what KEPT_BY_RESUME
    lists; or the disk has no room for what the run will write. A disk that fills up inside the block is a DiskError.
    """
    _require_run(folder)
    _require_room(folder, config, shape)
    with full_disk_explained(folder):
        _make(folder)
        with locked(folder / LOCK, ALIVE.format(folder=folder)):
            inputs = _digest_inputs(config, model_dir)
            trusted = ALL
            if _goes_on(folder, config):
                trusted = _require_unchanged(folder, config, inputs)
                # Before the new settings are the run's: a kill in between must not make them look like the old ones.
                Journal(folder / ROLLOUTS).forget_after(trained_steps(folder / CHECKPOINTS) + trusted)
            else:
                _clear(folder, config)
            # What becomes of an earlier run is said anew each time, never by a recipe that a run left.
            settled = replace(config.train, resume=False, overwrite=False, allow_changed=())
            write_whole(folder / CONFIG, dump_recipe(replace(config, train=settled)).encode())
            write_whole(folder / INPUTS, json.dumps(inputs, indent=2).encode())
            write_status(folder, "running")
            try:
                yield trusted
            except ValueError as error:  # a mistake of the user's, which starting again would find again
                write_status(folder, f"failed: {str(error).splitlines()[0]}")
                raise


def check_run_dir(folder: Path, config: Config, model_dir: Path, shape: ModelShape) -> None:
    """Raises the ValueError that `open_run_dir` would, and makes and deletes nothing."""
    _require_run(folder)
    _require_room(folder, config, shape)
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {folder}: {there} cannot be written to: name another")
    if (folder / LOCK).exists():
        with locked(folder / LOCK, ALIVE.format(folder=folder)):
            pass
    if _goes_on(folder, config):
        _require_unchanged(folder, config, _digest_inputs(config, model_dir))
    else:
        _require_not_read(folder, config)


def write_status(folder: Path, line: str) -> None:
    """Says how the run is, to whoever started it."""
    write_whole(folder / STATUS, f"{line}\n".encode())


def _require_run(folder: Path) -> None:
    """Raises ValueError unless there is nothing, or what a run has made, also one that was killed when it began to."""
    if not folder.exists() or (folder / CONFIG).is_file():
        return
    begun = {LOCK, f"{CONFIG}.partial", STATUS, STOP, LAUNCHER}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - begun:
        raise ValueError(f"--output-dir {folder} holds something that is no run (it has no {CONFIG}): name another")


def _goes_on(folder: Path, config: Config) -> bool:
    """Whether an earlier run is continued. Raises ValueError where nobody has said what to do about it."""
    if config.train.overwrite or not any((folder / name).exists() for name in WORTH_KEEPING):
        return False
    if not config.train.resume:
        raise ValueError(
            f"--output-dir {folder} holds a run already: --resume goes on with it, --overwrite deletes it, or name "
            f"another folder"
        )
    return True


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        raise ValueError(f"--output-dir {folder} cannot be made ({error.strerror}): name another") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--output-dir {folder} cannot be written to: name another")


def _clear(folder: Path, config: Config) -> None:
    """Deletes what a run writes, and nothing else. The folder and its lock stay: another run may be waiting there."""
    _require_not_read(folder, config)
    for path in (folder.resolve() / name for name in WRITTEN):  # of a link, the link alone is deleted
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _require_not_read(folder: Path, config: Config) -> None:
    """Raises ValueError where this run is to read some of what `_clear` deletes."""
    written = [folder.resolve() / name for name in WRITTEN]
    read = {"load": config.model.load, "replay_rollouts": config.rollout.replay_rollouts}
    for name, path in read.items():
        if path and any(path.resolve().is_relative_to(doomed) for doomed in written):
            raise ValueError(
                f"--{name.replace('_', '-')} {path} is part of the run that --output-dir {folder} holds and that "
                f"would be deleted: name another output folder"
            )


def _require_room(folder: Path, config: Config, shape: ModelShape) -> None:
    """Checkpoints and the export; rollouts and metrics are small beside them."""
    parameters, train = shape.num_parameters, config.train
    resumes = train.resume and is_megatron_checkpoint(folder / CHECKPOINTS)
    steps = range((trained_steps(folder / CHECKPOINTS) if resumes else 0) + 1, train.train_iters + 1)
    saves = sum(train.saves_after(step) for step in steps)
    if train.keep_last:  # and one more, while it is written
        spared = 0 if config.guard.on_collapse == "warn" else 2
        saves = min(saves, train.keep_last + bool(train.keep_best) + spared + 1)
    distributed = config.parallel.use_distributed_optimizer
    checkpoint = checkpoint_bytes(parameters, bf16=config.model.bf16, use_distributed_optimizer=distributed)
    export = parameters * (2 if config.model.bf16 else 4)
    exports = 1 + sum(train.exports_after(step) for step in steps)
    needed, free = saves * checkpoint + exports * export, free_bytes(folder)
    if train.overwrite:
        free += sum(used_bytes(folder / name) for name in WRITTEN)
    if needed > free:
        less_often = f"save less often than --save-interval {train.save_interval}, " if saves > 1 else ""
        less_often += "keep fewer of them (--keep-last), " if saves > 1 else ""
        raise ValueError(
            f"--output-dir {folder} has {readable(free)} free, and the run will write {readable(needed)}: {saves} "
            f"checkpoint{'s' * (saves != 1)} of {readable(checkpoint)} and "
            f"{'an export' if exports == 1 else f'{exports} exports'} of {readable(export)}. Make room, "
            f"{less_often}or name a folder on another disk"
        )


def _digest_inputs(config: Config, model_dir: Path) -> dict[str, str]:
    """sha256 of the questions (of a replay none: it asks none), and of what the model has beside its weights."""
    companions = (model_dir / name for name in COMPANIONS)
    inputs = {"load": _sha256(path for path in companions if path.is_file())}
    if config.rollout.replay_rollouts is None:
        inputs["data_path"] = _sha256([config.data.data_path])
    return inputs


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _require_unchanged(folder: Path, config: Config, inputs: Mapping[str, str]) -> int:
    """Raises ValueError where the run so far was made with other settings than it would go on with. Returns how many of
    the journal's steps after the checkpoint can be trusted."""
    before = load_recipe(folder / CONFIG)
    path = folder / INPUTS
    changes = _changes(before, config, json.loads(path.read_text()) if path.is_file() else {}, inputs)
    refused = [name for name in changes if name not in config.train.allow_changed]
    if refused:
        raise ValueError(
            f"--resume would go on with {folder} under other settings than it was made with: "
            f"{', '.join(changes[name] for name in refused)}. Take the old ones, say that they are to change "
            f"(--allow-changed {' '.join(changes)}), or begin a run of its own (another --output-dir)"
        )
    if config.rollout.replay_rollouts is not None:  # perhaps of this very journal
        return ALL
    if set(changes) - {*KEPT_BY_RESUME["objective"]}:
        return 0
    updates = [(c.optimizer, c.objective, c.train.updates_per_rollout, c.model.bf16) for c in (before, config)]
    decay = config.optimizer.lr_decay_style != "constant" and before.train.train_iters != config.train.train_iters
    return 1 + config.rollout.rollout_lead if updates[0] != updates[1] or decay else ALL


def _changes(before: Config, after: Config, old_inputs: Mapping[str, str], inputs: Mapping[str, str]) -> dict[str, str]:
    """{setting: `setting old -> new`} of those that a run keeps. Files are compared by what is in them, and the model
    by its name too: its weights are those of the checkpoint, whatever `load` has."""
    found = {}
    for section, names in KEPT_BY_RESUME.items():
        for name in names:
            old, new = (getattr(getattr(config, section), name) for config in (before, after))
            if name == "data_path":
                replays = before.rollout.replay_rollouts or after.rollout.replay_rollouts
                same = bool(replays) or old_inputs.get(name) == inputs[name]
            elif isinstance(old, Path) and isinstance(new, Path):
                same = old.resolve() == new.resolve() and old_inputs.get(name) == inputs.get(name)
            else:
                same = old == new
            if not same:
                found[name] = f"{name} {_shown(old, old_inputs.get(name))} -> {_shown(new, inputs.get(name))}"
    return found


def _shown(value: object, digest: str | None) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if digest is None else f"{text} (sha256 {digest[:8]})"
