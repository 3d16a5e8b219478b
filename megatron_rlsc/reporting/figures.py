"""Plots as SVG that stands in a page: by matplotlib, in the page's own colours, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from megatron_rlsc.reporting.responses import Responses
from megatron_rlsc.reporting.run import Figures, seconds_of

INK, GRID, BASE, RLSC = "#010101", "#020202", "#030303", "#040404"
PHASES = tuple(f"#05050{i}" for i in range(1, 7))
VARIABLES = {INK: "--ink", GRID: "--grid", BASE: "--base", RLSC: "--rlsc"} | {
    colour: f"--phase-{i}" for i, colour in enumerate(PHASES, start=1)
}
"""{a colour that matplotlib is given: the page's variable that takes its place}."""
SMALL, WIDE = (3.7, 2.1), (4.8, 2.5)
"""Inches: about as wide as a telephone, so that nothing is shrunk there."""
DOTTED = 40
"""Points of a line, up to which each has a dot."""
MANY = 200
"""Points, above which a line is of means, and pale behind it the points themselves."""
BINS = 40
_STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.formatter.useoffset": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A plot and its words."""

    title: str
    caption: str
    svg: str
    """An element, safe to stand in a page."""
    legend: tuple[tuple[str, str], ...] = ()
    """(words, variable of their colour)."""


def curve(title: str, points: Sequence[tuple[int, float]], *, caption: str = "") -> Figure:
    """A figure over the steps."""
    canvas, axes = _canvas(SMALL)
    _line(axes, points, RLSC)
    _steps(axes)
    last = next((value for _, value in reversed(points) if math.isfinite(value)), math.nan)
    return Figure(title=title, caption=caption, svg=_svg(canvas, f"{title} over the steps, {last:.4g} at the end"))


def held_out_curve(rows: Sequence[Figures]) -> Figure:
    """Accuracy over the steps, in its 95 % interval."""
    canvas, axes = _canvas(SMALL)
    steps = [row["step"] for row in rows]
    low, high = ([row.get(f"held_out/accuracy_{end}", math.nan) for row in rows] for end in ("low", "high"))
    axes.fill_between(steps, low, high, color=RLSC, alpha=0.2, linewidth=0)
    _line(axes, [(int(row["step"]), row.get("held_out/accuracy", math.nan)) for row in rows], RLSC)
    _steps(axes)
    caption = "Of --eval-data-path, in percent; the band is the 95 % interval. Step 0 is the base."
    return Figure(title="held_out/accuracy", caption=caption, svg=_svg(canvas, "held-out accuracy over the steps"))


def phase_seconds(rows: Sequence[Figures]) -> Figure:
    """Where the time of every step went."""
    phases = list(dict.fromkeys(phase for row in rows for phase in seconds_of(row)))
    colours = [PHASES[i % len(PHASES)] for i in range(len(phases))]
    canvas, axes = _canvas(WIDE)
    steps = [row["step"] for row in rows]
    seconds = [[seconds_of(row).get(phase, 0.0) for row in rows] for phase in phases]
    if len(rows) > DOTTED:
        axes.stackplot(steps, *seconds, colors=colours, linewidth=0)
    else:
        below = np.zeros(len(rows))
        for phase, colour in zip(seconds, colours):
            axes.bar(steps, phase, bottom=below, color=colour, width=0.8)
            below += np.array(phase)
    axes.set_ylabel("seconds")
    _steps(axes)
    whole = sum(map(sum, seconds))
    legend = tuple(
        (f"{phase} {100 * sum(spent) / whole if whole else 0:.0f} %", VARIABLES[colour])
        for phase, spent, colour in zip(phases, seconds, colours)
    )
    caption = f"{whole:.0f} s in {len(rows)} steps; saving, exporting and starting up are not counted."
    return Figure(title="time/", caption=caption, svg=_svg(canvas, "seconds of the phases of each step"), legend=legend)


def probability_figures(first: Responses, last: Responses) -> list[Figure]:
    """The distribution of p(y|x), as the paper's Figure 1b has it, and of log p(y|x), which long responses need."""
    legend = _before_and_after(first, last)
    pairs = [np.array(responses.logprobs) for responses in (first, last)]
    probabilities = [np.exp(logprobs) for logprobs in pairs]
    means = " → ".join(f"{p.mean():.3g}" for p in probabilities)
    lowest = min(min(logprobs) for logprobs in pairs)
    return [
        _shares(
            probabilities,
            np.linspace(0, 1, BINS // 2 + 1),
            title="p(y|x) of a whole response",
            caption=f"Mean {means}: the estimate of F, which RLSC raises.",
            legend=legend,
        ),
        _shares(
            pairs,
            np.linspace(min(1.02 * lowest, -0.1), 0, BINS + 1),
            title="log p(y|x)",
            caption="The same in nats, where probabilities of long responses can still be told apart.",
            legend=legend,
        ),
    ]


def length_figure(first: Responses, last: Responses) -> Figure:
    """Tokens of the responses before and after."""
    pairs = [np.array(responses.lengths, dtype=float) for responses in (first, last)]
    low, high = min(map(np.min, pairs)), max(map(np.max, pairs))
    if high - low < 10:  # a width to look at, where all are as long
        low, high = max(low - 5, 0), high + 5
    width = max(math.ceil((high - low + 1) / BINS), 1)
    means = " → ".join(f"{lengths.mean():.1f}" for lengths in pairs)
    return _shares(
        pairs,
        np.arange(low, high + width + 1, width) - 0.5,
        title="tokens of a response",
        caption=f"Mean {means}, the stop token included.",
        legend=_before_and_after(first, last),
    )


def _shares(
    pairs: Sequence[np.ndarray], bins: np.ndarray, *, title: str, caption: str, legend: tuple[tuple[str, str], ...]
) -> Figure:
    """Two histograms over each other, as shares of their responses."""
    canvas, axes = _canvas(WIDE)
    for values, colour in zip(pairs, (BASE, RLSC)):
        weights = np.full(len(values), 100 / len(values))
        axes.hist(values, bins=bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.35, linewidth=0)
        axes.hist(values, bins=bins, weights=weights, histtype="step", color=colour, linewidth=1.2)
    axes.set_ylabel("% of the responses")
    axes.set_xlim(bins[0], bins[-1])
    return Figure(title=title, caption=caption, svg=_svg(canvas, f"distribution of {title}"), legend=legend)


def _before_and_after(first: Responses, last: Responses) -> tuple[tuple[str, str], ...]:
    return (f"step {first.step}", VARIABLES[BASE]), (f"step {last.step}", VARIABLES[RLSC])


def _canvas(inches: tuple[float, float]) -> tuple[Canvas, Axes]:
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=inches)
        return canvas, canvas.add_subplot()


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str) -> None:
    data = np.array([(step, value if math.isfinite(value) else math.nan) for step, value in points])
    few = len(data) <= DOTTED
    if len(data) > MANY:
        axes.plot(*data.T, color=colour, linewidth=0.5, alpha=0.35)
        means = [part.mean(0) for part in np.array_split(data, MANY // 2)]  # NaN where one of them is
        data = np.array(means)
    axes.plot(*data.T, color=colour, linewidth=1.4, marker="o" if few else "", markersize=2)


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _svg(canvas: Canvas, label: str) -> str:
    """The element alone, its colours and font the page's, its ids told apart from those of its neighbours."""
    file = io.StringIO()
    nothing: Mapping[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": label, "svg.id": None}):
        canvas.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r"font-family: [^;\"]*;? ?|font: [\d.]+px [^;\"]*", _font_size, svg)
    svg = re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found[0]), svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]} role="img" aria-label="{_quoted(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def _font_size(found: re.Match[str]) -> str:
    size = re.match(r"font: ([\d.]+px)", found[0])
    return f"font-size: {size[1]}" if size else ""


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
