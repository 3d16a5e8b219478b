"""Where a step's seconds went: one rank's profiler trace as ranges and operators, those of all ranks as tables.

A trace is the list of events that torch.profiler exports for chrome://tracing, times in microseconds. Each moment of
the step belongs to the innermost range of ours (ranges.py) that is open, or to `communication` inside it: a collective
runs, and nothing is computed. Where the trace has a GPU's work, a moment belongs to the range that launched what runs,
computation before communication, or else to `GPU idle`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from megatron_rlsc.ranges import PREFIX, STEP

COMMUNICATION, IDLE = "communication", "GPU idle"
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of what a GPU does."""
LAUNCHES = ("cuda_runtime", "cuda_driver")
"""Of the calls that make it do so."""
COLLECTIVES = "gloo:"
"""Begins the names of gloo's."""
NCCL = "nccl"
"""Begins the names of NCCL's kernels."""
COMPUTES = "aten::"
"""Begins the names of operators that compute; others may hold one that waits for a collective."""
MESSAGES = ("gloo:send", "gloo:recv")
"""No collectives, and recorded until they are forgotten: megatron's own ranges tell when they have arrived."""
SHOWN = 15
"""Operators of a table."""


class Part(NamedTuple):
    """Of a range or an operator."""

    seconds: float
    """In which nothing else was under way inside it."""
    calls: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """One rank's step."""

    ranges: Mapping[str, Part]
    """By path, `train/forward-backward/attention`, in the order in which they began; the step's own is the first, ``.
    Their seconds add up to the step's."""
    operators: Mapping[str, Part]
    """By name; of a GPU, the operators that launched what it did."""


class Span(NamedTuple):
    """What began and ended, in microseconds."""

    begin: float
    end: float
    name: str
    path: str = ""
    """Of the range that it is, or belongs to."""
    communicates: bool = False
    """A collective, or a kernel of NCCL's."""


def break_down(events: Sequence[Mapping[str, Any]]) -> Breakdown:
    """Of one rank's trace, which must hold one step's range."""
    events = [event for event in events if event["ph"] == "X"]
    ranges = _ranges(events)
    begins, paths = zip(*((begin, inside.path) for begin, _, (inside,) in _sweep([ranges]) if inside))

    def path_at(time: float) -> str:
        return paths[max(bisect_right(begins, time) - 1, 0)]

    work = _device_work(events, path_at)
    pieces = _device_pieces(ranges, work) if work else _host_pieces(ranges, work := _host_work(events, path_at))
    seconds: dict[str, float] = {span.path: 0.0 for span in ranges}
    busy: dict[str, float] = defaultdict(float)
    for path, name, length in pieces:
        seconds[path] = seconds.get(path, 0.0) + length / 1e6
        busy[name] += length / 1e6
    calls = Counter(span.path for span in (*ranges, *(span for span in work if span.communicates)))
    times = Counter(span.name for span in work)
    return Breakdown(
        ranges={path: Part(own, calls[path]) for path, own in seconds.items()},
        operators={name: Part(busy[name], count) for name, count in times.items()},
    )


def _span(event: Mapping[str, Any], name: str, path: str = "", communicates: bool = False) -> Span:
    return Span(event["ts"], event["ts"] + event["dur"], name, path, communicates)


def _ranges(events: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Of ours, by their beginning; on whatever thread, since one waits while another has a range open."""
    found = [
        _span(event, event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    ]
    placed: list[Span] = []
    around: list[Span] = []
    for span in sorted(found, key=lambda span: (span.begin, -span.end)):
        while around and around[-1].end <= span.begin:
            around.pop()
        if around or span.name == STEP:
            path = f"{around[-1].path}/{span.name.removeprefix(PREFIX)}".removeprefix("/") if around else ""
            around.append(span._replace(path=path))
            placed.append(around[-1])
    assert placed, "the trace has no step"
    return placed


def _host_work(events: Sequence[Mapping[str, Any]], path_at: Callable[[float], str]) -> list[Span]:
    """Operators and gloo's collectives, but not the operators of the threads in which gloo runs."""
    collectives = [e for e in events if e["name"].startswith(COLLECTIVES) and e["name"] not in MESSAGES]
    (main,) = {event["tid"] for event in events if event["name"] == STEP}
    threads = {event["tid"] for event in collectives} - {main}
    operators = [e for e in events if e.get("cat") == "cpu_op" and e["tid"] not in threads]
    waits = [_span(e, e["name"], _inside(path_at(e["ts"]), COMMUNICATION), True) for e in collectives]
    return [_span(event, event["name"]) for event in operators] + waits


def _device_work(events: Sequence[Mapping[str, Any]], path_at: Callable[[float], str]) -> list[Span]:
    """Kernels and copies, in the ranges that were open when they were launched, under the names of their operators."""
    launched = {e["args"].get("correlation"): e["ts"] for e in events if e.get("cat") in LAUNCHES}
    operators = {e["args"].get("External id"): e["name"] for e in events if e.get("cat") == "cpu_op"}
    work = []
    for event in events:
        if event.get("cat") in ON_DEVICE:
            name, args = event["name"], event["args"]
            path, communicates = path_at(launched.get(args.get("correlation"), event["ts"])), name.startswith(NCCL)
            path = _inside(path, COMMUNICATION) if communicates else path
            work.append(_span(event, operators.get(args.get("External id", ""), name), path, communicates))
    return work


def _layers(ranges: list[Span], work: list[Span]) -> list[list[Span]]:
    return [ranges, [s for s in work if not s.communicates], [s for s in work if s.communicates]]


def _host_pieces(ranges: list[Span], work: list[Span]) -> Iterator[tuple[str, str, float]]:
    """(path, operator or ``, microseconds) of the step, piece by piece."""
    for begin, end, (inside, operator, collective) in _sweep(_layers(ranges, work)):
        computes = operator and operator.name.startswith(COMPUTES)
        if inside and collective and not computes:
            yield _inside(inside.path, COMMUNICATION), collective.name, end - begin
        elif inside:
            yield inside.path, operator.name if operator else "", end - begin


def _device_pieces(ranges: list[Span], work: list[Span]) -> Iterator[tuple[str, str, float]]:
    """Likewise, of a GPU."""
    for begin, end, (inside, computation, communication) in _sweep(_layers(ranges, work)):
        if inside and (running := computation or communication):
            yield running.path, running.name, end - begin
        elif inside:
            yield _inside(inside.path.partition("/")[0], IDLE), "", end - begin


def _sweep(layers: Sequence[Sequence[Span]]) -> Iterator[tuple[float, float, list[Span | None]]]:
    """(begin, end, of each layer the open span that began last) of each piece of time in which that is the same."""
    waiting = [sorted(layer, key=lambda span: (span.begin, -span.end), reverse=True) for layer in layers]
    stacks: list[list[Span]] = [[] for _ in layers]
    for begin, end in pairwise(sorted({time for layer in layers for span in layer for time in span[:2]})):
        for queue, stack in zip(waiting, stacks):
            while queue and queue[-1].begin <= begin:
                stack.append(queue.pop())
            while stack and stack[-1].end <= begin:
                stack.pop()
        yield begin, end, [stack[-1] if stack else None for stack in stacks]


def _inside(path: str, name: str) -> str:
    """Of what has no range of its own; between the phases nothing is told apart."""
    return f"{path}/{name}" if path else ""


def tables(ranks: Sequence[Breakdown]) -> str:
    """Markdown of a step: its phases, what is inside of each, and the operators that took longest. Seconds are the mean
    over the ranks, and the largest; `own` seconds are those in which nothing of the rows below was under way."""
    paths = list(dict.fromkeys(path for rank in ranks for path in rank.ranges))
    own = {path: [rank.ranges.get(path, Part(0.0, 0)).seconds for rank in ranks] for path in paths}
    calls = {path: max(rank.ranges.get(path, Part(0.0, 0)).calls for rank in ranks) for path in paths}
    whole = {path: [sum(parts) for parts in zip(*(own[p] for p in paths if _is_in(p, path)))] for path in paths}
    phases = [path for path in paths if path and "/" not in path]

    rows = [[phase, *_seconds(whole[phase]), _share(whole[phase], whole[""])] for phase in phases]
    rows += [["between phases", *_seconds(own[""]), _share(own[""], whole[""])]]
    rows += [["all", *_seconds(whole[""]), "100.0"]]
    written = [_markdown(["phase", "mean, s", "max, s", "%"], rows)]
    for phase in phases:
        inside = _tree(phase, paths, whole)
        if inside:
            rows = [
                [
                    "· " * (path.count("/") - 1) + path.rpartition("/")[2],
                    str(calls[path]),
                    *_seconds(whole[path]),
                    f"{fmean(own[path]):.3f}",
                    _share(own[path], whole[phase]),
                ]
                for path in inside
            ]
            mean, largest = _seconds(own[phase])
            rows += [["the rest", "", mean, largest, mean, _share(own[phase], whole[phase])]]
            written.append(_markdown([f"in {phase}", "calls", "mean, s", "max, s", "own: mean, s", "%"], rows))

    names = dict.fromkeys(name for rank in ranks for name in rank.operators)
    busy = {name: [rank.operators.get(name, Part(0.0, 0)) for rank in ranks] for name in names}
    most = sorted(busy, key=lambda name: -sum(part.seconds for part in busy[name]))[:SHOWN]
    rows = []
    for name in most:
        seconds = [part.seconds for part in busy[name]]
        rows.append([name, str(max(part.calls for part in busy[name])), *_seconds(seconds), _share(seconds, whole[""])])
    written.append(_markdown(["operator", "calls", "own: mean, s", "max, s", "% of the step"], rows))
    return "\n".join(written)


def _is_in(path: str, around: str) -> bool:
    return not around or path == around or path.startswith(f"{around}/")


def _tree(top: str, paths: Sequence[str], whole: Mapping[str, Sequence[float]]) -> list[str]:
    """All that is inside, each followed by its own, the longest first."""
    children = [path for path in paths if path.rpartition("/")[0] == top]
    children.sort(key=lambda path: -sum(whole[path]))
    return [path for child in children for path in (child, *_tree(child, paths, whole))]


def _seconds(ranks: Sequence[float]) -> list[str]:
    return [f"{fmean(ranks):.3f}", f"{max(ranks):.3f}"]


def _share(part: Sequence[float], whole: Sequence[float]) -> str:
    return f"{100 * sum(part) / (sum(whole) or 1):.1f}"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, for those who read it as text."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lined = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (heads, rule, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in lined)
