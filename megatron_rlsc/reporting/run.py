"""A run's folder as others read it: running, stopped or done, with whatever of its files there is."""

from __future__ import annotations

import json
import os
import socket
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_rlsc.config import Config
from megatron_rlsc.run_folder.names import (
    CONFIG,
    GUARD,
    HELD_OUT,
    LAUNCHER,
    LOCK,
    METRICS,
    ROLLOUTS,
    SHOWN,
    STATUS,
)

State = Literal["running", "stopped", "done", "failed", "crashed", "unknown"]
Figures = Mapping[str, float]
"""{tag: value} of a step, with `step`."""
T = TypeVar("T")
TAIL_BYTES = 4096
"""Of a log, in which its last line is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A line of guard.jsonl."""

    step: int
    what: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A line of shown.jsonl: the fixed prompts, answered with the weights after a step."""

    step: int
    answers: tuple[Mapping[str, Any], ...]
    """`prompt`, `response`, `finish_reason`, `tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a folder says at one moment."""

    folder: Path
    status: str
    """The file's line; empty where there is none yet."""
    state: State
    """Its first word; `crashed` where that is `running` and the process that held the lock here is gone."""
    launcher: str
    """The last line of the launcher's log; empty where nothing was launched."""
    settings: Mapping[str, Mapping[str, Any]]
    """{section: {name: value}} of config.toml."""
    steps: tuple[Figures, ...]
    """Of metrics.jsonl, ascending."""
    held_out: tuple[Figures, ...]
    shown: tuple[Shown, ...]
    findings: tuple[Finding, ...]
    sampled: int | None
    """Questions that are answered of the step that is being sampled; None where none is."""
    idle_seconds: float
    """Since the newest line of metrics.jsonl, of the journal or of the status."""

    @property
    def total(self) -> int:
        """Steps that it is to make."""
        return int(self.setting("train", "train_iters"))

    @property
    def last(self) -> int:
        """The last step that is done; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def setting(self, section: str, name: str) -> Any:
        """Of config.toml, or the default."""
        return self.settings.get(section, {}).get(name, getattr(getattr(Config(), section), name))

    def series(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) of every step, or evaluation, that has the figure."""
        rows = self.steps if any(tag in row for row in self.steps) else self.held_out
        return [(int(row["step"]), row[tag]) for row in rows if tag in row]

    @property
    def tags(self) -> list[str]:
        """Of all figures, in the order in which they are written."""
        return list(dict.fromkeys(tag for row in (*self.steps, *self.held_out) for tag in row if tag != "step"))


def seconds_of(row: Figures) -> dict[str, float]:
    """{phase: seconds} of a step."""
    return {tag.removeprefix("time/"): value for tag, value in row.items() if tag.startswith("time/")}


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`, `45 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def group_of(tag: str) -> str:
    """`confidence` of `confidence/mean`; empty for a tag without one."""
    return tag.rpartition("/")[0]


def read_run(folder: Path) -> Run:
    """Raises ValueError where there is no folder, or one that is no run's."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name the --output-dir of a run")
    if not any((folder / name).exists() for name in (CONFIG, STATUS, LAUNCHER)):
        raise ValueError(f"{folder} is no run's folder: it has no {CONFIG}, no {STATUS} and no {LAUNCHER}/")
    status = _text(folder / STATUS).strip()
    steps = _ascending(read_lines(folder / METRICS, _figures))
    begun = folder / ROLLOUTS / f"begun-{int(steps[-1]['step'] if steps else 0) + 1:06d}.jsonl"
    groups = read_lines(begun, lambda line: int(line["group"])) if begun.is_file() else []
    return Run(
        folder=folder,
        status=status,
        state=_state(status, _text(folder / LOCK)),
        launcher=_last_line(folder / LAUNCHER / "launcher.log"),
        settings=_settings(folder / CONFIG),
        steps=steps,
        held_out=_ascending(read_lines(folder / HELD_OUT, _figures)),
        shown=tuple(read_lines(folder / SHOWN, _shown)),
        findings=tuple(read_lines(folder / GUARD, _finding)),
        sampled=len(set(groups)) if begun.is_file() else None,
        idle_seconds=_idle_seconds(folder / METRICS, folder / STATUS, begun, folder / ROLLOUTS),
    )


def read_lines(path: Path, take: Callable[[dict[str, Any]], T]) -> list[T]:
    """What is taken of every line of a JSONL. A line that is half-written, damaged or lacks what is taken is left out;
    a file that is not there has none."""
    found = []
    for line in _bytes(path).split(b"\n"):
        try:
            found.append(take(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _figures(line: dict[str, Any]) -> Figures:
    return {"step": int(line["step"])} | {k: float(v) for k, v in line.items() if isinstance(v, (int, float))}


def _ascending(rows: list[Figures]) -> tuple[Figures, ...]:
    """Of a step that is there twice the later line counts."""
    return tuple(row for _, row in sorted({int(row["step"]): row for row in rows}.items()))


def _shown(line: dict[str, Any]) -> Shown:
    answers = tuple(
        {key: str(answer[key]) for key in ("prompt", "response", "finish_reason")} | {"tokens": int(answer["tokens"])}
        for answer in line["answers"]
    )
    return Shown(step=int(line["step"]), answers=answers)


def _finding(line: dict[str, Any]) -> Finding:
    return Finding(step=int(line["step"]), what=str(line["what"]), text=str(line["text"]))


def _settings(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        found = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    return {section: values for section, values in found.items() if isinstance(values, dict)}


def _state(status: str, holder: str) -> State:
    word = status.partition(" ")[0].rstrip(":")
    if word == "running":
        return "crashed" if _is_gone(holder) else "running"
    return word if word in ("stopped", "done", "failed") else "unknown"  # type: ignore[return-value]


def _is_gone(holder: str) -> bool:
    """Whether the process of `process 17 on node3` is known to be gone; of another machine nothing is known."""
    words = holder.split()
    if len(words) != 4 or not words[1].isdigit() or words[3] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _idle_seconds(*paths: Path) -> float:
    times = []
    for path in paths:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(time.time() - max(times), 0.0) if times else 0.0


def _last_line(path: Path) -> str:
    lines = _bytes(path, last=TAIL_BYTES).decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace")


def _bytes(path: Path, *, last: int | None = None) -> bytes:
    """Of a file, or its end; nothing where it is not there."""
    try:
        with path.open("rb") as file:
            if last is not None:
                file.seek(max(path.stat().st_size - last, 0))
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return b""
