"""A run in the terminal: how far it is, what each step came to, where the time goes, and how long it will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_rlsc.reporting.run import Figures, Run, State, duration, seconds_of

RECENT = 20
"""Steps that the time left, and the seconds of the phases, are the mean of."""
COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("confidence/mean", "conf", "{:.4f}"),
    ("confidence/identical_share", "same", "{:.3f}"),
    ("policy/token_entropy", "entropy", "{:.3f}"),
    ("rollout/response_length", "length", "{:.1f}"),
    ("rollout/truncated_share", "cut", "{:.3f}"),
    ("optimizer/gradient_norm", "grad", "{:.3f}"),
    ("speed/tokens_per_second", "tok/s", "{:.0f}"),
)
"""(figure, head, form): of the table of steps."""
TRENDS = ("confidence/mean", "policy/token_entropy", "rollout/response_length", "held_out/accuracy")
"""Figures that have a line of blocks, of the whole run."""
WARNED = (
    ("weights/weightless", 0.0, "no response weighs anything: the step learned nothing"),
    ("weights/negligible_share", 0.5, "of the responses weigh nothing but alpha"),
    ("rollout/truncated_share", 0.2, "of the responses are cut at the limit"),
    ("rollout/repeated_share", 0.2, "of the runs of 8 tokens were said before in their response"),
)
"""(figure, above which it is said, words)."""
COLOURS: dict[State, str] = {
    "running": "cyan",
    "done": "green",
    "stopped": "yellow",
    "failed": "red",
    "crashed": "red",
    "unknown": "yellow",
}
BLOCKS = "▁▂▃▄▅▆▇█"


def view(run: Run, *, rows: int) -> RenderableType:
    """Everything; `rows` of the last steps."""
    parts: list[RenderableType] = [_head(run), _progress(run)]
    if run.steps:
        parts += [_steps(run.steps[-rows:]), _phases(run.steps[-RECENT:]), _trends(run)]
    parts += [Text(f"! {line}", style="yellow") for line in warnings(run)]
    parts += [
        Text(f"guard, step {one.step}: {plain(one.what)}: {plain(one.text)}", style="red") for one in run.findings[-3:]
    ]
    if run.launcher:
        parts.append(Text(f"launcher: {plain(run.launcher)}", style="dim"))
    return Panel(Group(*parts), title=Text(plain(str(run.folder))), border_style=COLOURS[run.state])


def seconds_left(run: Run) -> float | None:
    """Until the last step is done: the mean of the last steps, less what the current one has had. None where it is not
    running, or no step is done."""
    if run.state != "running" or not run.steps:
        return None
    mean = fmean(sum(seconds_of(row).values()) for row in run.steps[-RECENT:])
    return max((run.total - run.last) * mean - min(run.idle_seconds, mean), 0.0)


def warnings(run: Run) -> list[str]:
    """What the last step's figures say that should not be so, in words."""
    if not run.steps:
        return []
    last = run.steps[-1]
    found = [f"{tag} {last[tag]:.2g}: {words}" for tag, limit, words in WARNED if last.get(tag, 0.0) > limit]
    return found + [f"{tag} is not finite" for tag, value in last.items() if not math.isfinite(value)]


def plain(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(character if character.isprintable() else "�" for character in text)


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Blocks from the lowest value to the highest, at most `width` of them."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    if len(finite) > width:
        edges = [round(i * len(finite) / width) for i in range(width + 1)]
        finite = [fmean(finite[a:b]) for a, b in pairwise(edges)]
    low, span = min(finite), max(finite) - min(finite)
    return "".join(BLOCKS[int((value - low) / span * (len(BLOCKS) - 1) + 0.5) if span else 0] for value in finite)


def _head(run: Run) -> Text:
    text = Text()
    text.append(run.state, style=f"bold {COLOURS[run.state]}")
    if run.state == "crashed":
        text.append("  the status says that it runs, and its process is gone; --resume goes on")
    elif run.status not in ("", run.state):
        text.append(f"  {plain(run.status)}")
    elif run.state == "unknown":
        text.append("  it has not begun yet")
    model, temperature = run.setting("model", "load"), run.setting("rollout", "temperature")
    text.append(
        f"\n{plain(str(model))} · {run.setting('data', 'prompts_per_step')} questions x "
        f"{run.setting('rollout', 'samples_per_prompt')} responses · T {temperature} · "
        f"{run.setting('objective', 'objective')} · alpha {run.setting('objective', 'alpha')} · "
        f"lr {run.setting('optimizer', 'lr')}",
        style="dim",
    )
    return text


def _progress(run: Run) -> Table:
    table = Table.grid(padding=(0, 2))
    words = f"step {run.last}/{run.total}"
    left = seconds_left(run)
    if left is not None:
        words += f", {duration(left)} left"
    if run.state == "running":
        asked = run.setting("data", "prompts_per_step")
        if run.sampled is not None:
            words += f", step {run.last + 1}: {run.sampled} of {asked} questions answered"
        words += f", last written {duration(run.idle_seconds)} ago"
    table.add_row(ProgressBar(total=run.total, completed=run.last, width=24), Text(words))
    return table


def _steps(rows: Sequence[Figures]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
    known = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    for head in ("step", *(head for _, head, _ in known), "s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [form.format(row[tag]) if tag in row else "" for tag, _, form in known]
        table.add_row(f"{row['step']:.0f}", *cells, f"{sum(seconds_of(row).values()):.1f}")
    return table


def _phases(rows: Sequence[Figures]) -> Table:
    table = Table.grid(padding=(0, 1))
    phases = list(dict.fromkeys(phase for row in rows for phase in seconds_of(row)))
    means = {phase: fmean(seconds_of(row).get(phase, 0.0) for row in rows) for phase in phases}
    whole = sum(means.values())
    for phase, mean in means.items():
        share = mean / whole if whole else 0.0
        table.add_row(Text(plain(phase)), f"{mean:.1f} s", f"{100 * share:.0f} %", Bar(1.0, 0.0, share, width=24))
    return table


def _trends(run: Run) -> Table:
    table = Table.grid(padding=(0, 1))
    for tag in TRENDS:
        values = [value for _, value in run.series(tag) if math.isfinite(value)]
        if len(values) > 1:
            table.add_row(Text(tag), f"{values[0]:.3g}", Text(sparkline(values), style="cyan"), f"{values[-1]:.3g}")
    return table
