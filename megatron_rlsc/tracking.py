"""What a person watches: metrics.jsonl, TensorBoard, a progress bar, one line a step, and the phases' seconds."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_rlsc.board import Board
from megatron_rlsc.disk import write_whole
from megatron_rlsc.ranges import span
from megatron_rlsc.types import Health, Load, ResponseScores, Sample, StepStats


class Timer:
    """Seconds of the phases of a step, each a range that a profiler sees."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the phase."""
        start = time.perf_counter()
        try:
            with span(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """The phases since the last lap, and starts anew."""
        seconds, self.seconds = self.seconds, {}
        return seconds


class Tracker:
    """Rank 0's view of a run; on other ranks, nothing."""

    def __init__(
        self,
        metrics: Path,
        tensorboard: Path,
        *,
        start: int,
        total: int,
        enabled: bool,
        settings: Mapping[str, bool | float | str] | None = None,
    ) -> None:
        """
        Args:
            metrics: a JSON line a step; lines past `start` are dropped.
            tensorboard: folder of event files; points past `start` are hidden.
            start: the last step that is done.
            total: the last step to do.
            settings: of the run, for TensorBoard (`board.compared_settings`).
        """
        self.enabled = enabled
        if not enabled:
            return
        self._files, self._settings = (metrics, tensorboard), settings or {}
        self._open(start)
        self._total = total
        self._bar = tqdm(total=total, initial=start, desc="RLSC", unit="step", disable=not sys.stderr.isatty())

    def _open(self, start: int) -> None:
        metrics, tensorboard = self._files
        lines_up_to(metrics, start)
        self._metrics = metrics.open("a")
        self._board = Board(tensorboard, start=start, settings=self._settings)

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: drops and hides the later ones, as a new tracker would."""
        if self.enabled:
            self._board.close()
            self._metrics.close()
            self._open(step)
            self._bar.n = step
            self._bar.refresh()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._metrics.close()

    def log(self, stats: StepStats, samples: Sequence[Sample], scores: ResponseScores) -> None:
        """Writes a step down everywhere, flushed: a killed run keeps what it had."""
        if not self.enabled:
            return
        figures = flatten(stats)
        self._metrics.write(json.dumps(figures) + "\n")
        self._metrics.flush()
        self._board.add_figures(stats.step, {tag: value for tag, value in figures.items() if tag != "step"})
        self._board.add_distributions(stats.step, samples, scores)
        if stats.step == self._total:
            self._board.end()
        self._board.flush()
        self.say(step_line(stats, self._total))
        self._bar.update()

    def log_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """More of a step for TensorBoard, flushed."""
        if self.enabled:
            self._board.add_figures(step, figures)
            self._board.flush()

    def log_text(self, step: int, tag: str, parts: Mapping[str, str]) -> None:
        """{heading: text} of a step for TensorBoard, flushed."""
        if self.enabled:
            self._board.add_text(step, tag, parts)
            self._board.flush()

    def say(self, text: str) -> None:
        """A line for the person who watches, above the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def flatten(stats: StepStats) -> dict[str, float]:
    """{tag: value} of a step, `step` first."""

    def tagged(record: Any) -> dict[str, float]:
        named = {f.metadata["tag"]: getattr(record, f.name) for f in dataclasses.fields(record) if "tag" in f.metadata}
        return {tag: float(value) for tag, value in named.items() if value is not None}

    phases = {f"time/{name}": seconds for name, seconds in stats.seconds.items()}
    return {"step": stats.step} | tagged(stats.health) | tagged(stats.load) | tagged(stats) | phases


def tags_of_a_step() -> list[str]:
    """Of all figures that a step can have."""
    return [f.metadata["tag"] for record in (Health, Load, StepStats) for f in dataclasses.fields(record) if f.metadata]


def require_figure(name: str) -> None:
    """Raises ValueError unless `name` is empty or, but for a minus before it, a figure of every step."""
    tags = tags_of_a_step()
    if name and name.removeprefix("-") not in tags:
        raise ValueError(f"--keep-best {name}: metrics.jsonl has no such figure; it has {', '.join(tags)}")


def step_line(stats: StepStats, total: int) -> str:
    """A step in one line."""
    health = stats.health
    mismatch = f"sampler off by {health.logprob_difference:.1e}"
    if health.log_ratio is not None:
        mismatch = f"log p / p_old {health.log_ratio:+.3f}"
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stats.seconds.items())
    return (
        f"step {stats.step:>{len(str(total))}}/{total} | loss {health.loss:7.4f} | "
        f"confidence {health.confidence:.4f} | same {health.identical_share:.3f} | "
        f"entropy {health.token_entropy:.3f} | length {health.response_length:.1f} | "
        f"cut {health.truncated_share:.3f} | grad {stats.gradient_norm:7.3f} | "
        f"{mismatch} | {sum(stats.seconds.values()):.1f} s ({phases}) | "
        f"{stats.tokens_per_second:.0f} tok/s"
    )


def lines_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The JSON lines of a file, of which those of steps past `step` are dropped there and then: a resumed run will make
    them again; and a line that a kill cut in half."""
    kept: list[dict[str, Any]] = []
    if not path.is_file():
        return kept
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(record)
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept
