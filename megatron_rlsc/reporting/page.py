"""One HTML file that says what a run did: everything is in it, and it asks for nothing."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megatron_rlsc.config import Config
from megatron_rlsc.evaluation.statistics import Estimate
from megatron_rlsc.reporting.benchmarks import benchmark_table, read_results
from megatron_rlsc.reporting.cases import Cases, graded_cases, journal_cases, shown_cases
from megatron_rlsc.reporting.figures import (
    Figure,
    curve,
    held_out_curve,
    length_figure,
    phase_seconds,
    probability_figures,
)
from megatron_rlsc.reporting.meanings import meanings
from megatron_rlsc.reporting.responses import first_and_last
from megatron_rlsc.reporting.run import Run, duration, group_of, seconds_of
from megatron_rlsc.run_folder.names import ROLLOUTS

GROUPS = ("", "confidence", "held_out", "rollout", "policy", "weights", "guard", "optimizer", "sync", "speed")
"""In this order, the others after them; `time` has a plot of its own."""
BAND = ("held_out/accuracy_low", "held_out/accuracy_high")
"""The interval that the plot of held_out/accuracy has already."""
TILES = (
    ("confidence/mean", "confidence F"),
    ("confidence/identical_share", "same answer twice"),
    ("policy/token_entropy", "token entropy"),
    ("rollout/response_length", "tokens a response"),
    ("held_out/accuracy", "held-out accuracy, %"),
)
"""(figure, words): from the first step that has it to the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    words: str
    first: str
    last: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    name: str
    value: str
    is_default: bool


def render_page(run: Run, *, base: Path, rlsc: Path) -> str:
    """The page.

    Args:
        base: --output of tools/evaluate.py for the base model; nothing may be there.
        rlsc: and for the trained one.
    """
    environment = Environment(
        loader=PackageLoader("megatron_rlsc.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "interval": interval,
        "duration": duration,
        "drawn": lambda figure: Markup(figure.svg),
    }  # SVG of our own
    figures, constant = curves(run)
    distributions, why_none = probabilities(run)
    cases, why_no_case = studies(run, base, rlsc)
    return environment.get_template("page.html").render(
        run=run,
        name=run.folder.resolve().name,
        tiles=tiles(run),
        seconds=sum(sum(seconds_of(row).values()) for row in run.steps),
        probabilities=distributions,
        why_none=why_none,
        table=benchmark_table(read_results(base), read_results(rlsc)),
        studies=cases,
        why_no_case=why_no_case,
        figures=figures,
        constant=constant,
        phases=phase_seconds(run.steps) if any(seconds_of(row) for row in run.steps) else None,
        sections=settings(run),
    )


def write_page(path: Path, page: str) -> None:
    """A lone half of a surrogate pair, which JSON may hold and UTF-8 may not, becomes a question mark."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(page.encode("utf-8", "replace"))
    partial.replace(path)


def tiles(run: Run) -> list[Tile]:
    """The few figures at the top."""
    found = []
    for tag, words in TILES:
        values = [value for _, value in run.series(tag) if math.isfinite(value)]
        if values:
            found.append(Tile(words=words, first=f"{values[0]:.3g}", last=f"{values[-1]:.3g}"))
    return found


def probabilities(run: Run) -> tuple[list[Figure], str]:
    """How probable, and how long, responses were at the first step and the last; or why that is not known."""
    try:
        both = first_and_last(run.folder / ROLLOUTS)
    except ValueError as error:
        return [], str(error)
    if both is None:
        return [], "The journal does not have two whole steps."
    return [*probability_figures(*both), length_figure(*both)], ""


def curves(run: Run) -> tuple[list[Figure], dict[str, float]]:
    """A plot of each figure, also of those that nobody here knows, and {tag: value} of what never moved."""
    figures, constant = [], {}
    tags = [tag for tag in run.tags if group_of(tag) != "time" and tag not in BAND]
    for tag in sorted(tags, key=lambda tag: GROUPS.index(group_of(tag)) if group_of(tag) in GROUPS else len(GROUPS)):
        points = run.series(tag)
        if len(points) > 1 and len({value for _, value in points}) == 1:
            constant[tag] = points[0][1]
        elif tag == "held_out/accuracy" and all(other in run.tags for other in BAND):
            figures.append(held_out_curve(run.held_out))
        else:
            figures.append(curve(tag, points, caption=meanings().get(tag, "")))
    return figures, constant


def studies(run: Run, base: Path, rlsc: Path) -> tuple[list[Cases], str]:
    """Case studies of every source that there is, or why there are none; of the journal where there is no other, since
    it is the slowest."""
    found = [cases for cases in (graded_cases(base, rlsc), shown_cases(run)) if cases is not None]
    if found:
        return found, ""
    try:
        cases = journal_cases(run)
    except ValueError as error:  # a damaged step, or no tokenizer beside it
        return [], str(error)
    if cases is None:
        return [], "No question was answered before and after: no evaluation, no --show-prompts, none asked again."
    return [cases], ""


def settings(run: Run) -> dict[str, list[Setting]]:
    """{section: its settings}."""
    default = dataclasses.asdict(Config())
    return {
        section: [
            Setting(
                name=name,
                value=_shown(value),
                is_default=_shown(default.get(section, {}).get(name)) == _shown(value),
            )
            for name, value in values.items()
        ]
        for section, values in run.settings.items()
    }


def interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """`46.2 [41.9, 50.6]`."""
    if estimate is None:
        return "–"
    form = "{:+.1f} [{:+.1f}, {:+.1f}]" if signed else "{:.1f} [{:.1f}, {:.1f}]"
    return form.format(estimate.value, estimate.low, estimate.high)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
