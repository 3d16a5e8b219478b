"""The profile of a run: what torch's profiler records of a few steps on every rank, written as traces and as tables."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_rlsc.breakdown import Breakdown, Part, break_down, tables
from megatron_rlsc.config import TrainConfig
from megatron_rlsc.conversion.atomic import whole_folder
from megatron_rlsc.disk import readable
from megatron_rlsc.policy.marks import marked
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.ranges import PREFIX, span
from megatron_rlsc.run_folder.names import PROFILE
from megatron_rlsc.tracking import Tracker

PHASES = "phases.md"
LARGEST = 1_000_000
"""Events of a trace on disk: 250 MB unpacked, which a browser still opens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a rank says of its step."""

    breakdown: Breakdown
    memory: int
    """Bytes at the peak: of a GPU's tensors during the step, or of the process until now."""
    recorded: int
    """Events."""
    written: int
    """Of them, to the trace on disk."""

    def encode(self) -> str:
        """For another rank."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Report:
        """What `encode` was given."""
        fields = json.loads(text)
        parts = {kind: {name: Part(*part) for name, part in of.items()} for kind, of in fields["breakdown"].items()}
        return cls(**fields | {"breakdown": Breakdown(**parts)})


class NoProfile:
    """Of a run without --profile."""

    def start(self, step: int) -> None:
        pass

    def stop(self) -> None:
        pass

    def drop(self) -> None:
        pass


class Profile(NoProfile):
    """One on every rank."""

    def __init__(self, config: TrainConfig, policy: Policy, tracker: Tracker) -> None:
        self._steps = range(config.profile_step_start, config.profile_step_end + 1)
        self._folder, self._policy, self._tracker = config.output_dir / PROFILE, policy, tracker
        self._step = 0
        self._recording: ExitStack | None = None
        self._profiler: torch.profiler.profile | None = None

    def start(self, step: int) -> None:
        """Records from here on, where the step is one of those."""
        if step not in self._steps:
            return
        if self._policy.parallel.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._step, self._recording = step, ExitStack()
        self._recording.enter_context(marked(self._policy.chunks, self._policy.optimizer))
        self._profiler = self._recording.enter_context(torch.profiler.profile())
        self._recording.enter_context(span("step"))

    def stop(self) -> None:
        """Writes what was recorded of the step, and says it. A collective of all ranks."""
        if not self._recording or not self._profiler:
            return
        self._recording.close()
        profiler = self._profiler
        parallel, folder = self._policy.parallel, self._folder / f"step-{self._step:06d}"
        turn = parallel.next_turn()
        if parallel.rank > 0:
            report = self._write(profiler, folder.with_name(parallel.hear(turn)))
            parallel.tell(f"{turn}/{parallel.rank}", report.encode())
        else:
            with whole_folder(folder, overwrite=True) as partial:
                parallel.tell(turn, partial.name)
                reports = [self._write(profiler, partial)]
                # At the store, where nothing times out: each rank takes its time over its trace.
                reports += [Report.decode(parallel.hear(f"{turn}/{rank}")) for rank in range(1, parallel.world_size)]
                text = self._describe(reports)
                (partial / PHASES).write_text(text)
            self._tracker.say(f"{text}\n{folder}: open a rank-*.json.gz in https://ui.perfetto.dev")
        self.drop()

    def drop(self) -> None:
        """Forgets what was recorded of a step: it is written, or was cut short."""
        if self._recording:
            self._recording.close()
            self._recording = self._profiler = None

    def _write(self, profiler: torch.profiler.profile, folder: Path) -> Report:
        parallel = self._policy.parallel
        on_gpu = parallel.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()  # before the trace takes its own
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "trace.json")
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        events = trace["traceEvents"]
        trace["traceEvents"] = first_events(events, LARGEST)
        with gzip.open(folder / f"rank-{parallel.rank}.json.gz", "wt", compresslevel=5) as file:
            json.dump(trace, file)
        return Report(
            breakdown=break_down(events),
            memory=memory,
            recorded=len(events),
            written=len(trace["traceEvents"]),
        )

    def _describe(self, reports: Sequence[Report]) -> str:
        parallel, memory = self._policy.parallel, [report.memory for report in reports]
        whose = "a GPU's tensors in this step" if parallel.device.type == "cuda" else "a process until this step"
        lines = [
            f"# Where the time of step {self._step} went",
            "",
            f"{parallel} on {parallel.device.type}, recorded by a profiler, which takes time as well.",
            f"Memory of {whose}, at its peak: {readable(max(memory))}; mean {readable(int(fmean(memory)))}.",
        ]
        lines += [
            f"rank-{rank}.json.gz has the first {report.written} of {report.recorded} events; the tables are of all."
            for rank, report in enumerate(reports)
            if report.written < report.recorded
        ]
        return "\n".join([*lines, "", tables([report.breakdown for report in reports])])


def first_events(events: list[dict[str, Any]], largest: int) -> list[dict[str, Any]]:
    """Of so many: all that name something (ranges, threads), and the first ones of the others."""
    if len(events) <= largest:
        return events

    def names(event: dict[str, Any]) -> bool:
        return event["ph"] == "M" or event["name"].startswith(PREFIX)

    kept = [event for event in events if names(event)]
    others = sorted((event for event in events if not names(event)), key=lambda event: event["ts"])
    return kept + others[: max(largest - len(kept), 0)]


def peak_memory() -> int:
    """Bytes that this process had at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def open_profile(config: TrainConfig, policy: Policy, tracker: Tracker, *, start: int) -> NoProfile:
    """What the loop tells of its steps on this rank; `start` is the last step that is done."""
    if not config.profile:
        return NoProfile()
    if start >= config.profile_step_end:
        tracker.say(f"--profile: step {config.profile_step_end}, the last to be profiled, is done already")
    return Profile(config, policy, tracker)
