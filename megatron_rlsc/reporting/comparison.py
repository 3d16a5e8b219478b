"""Several runs beside each other, and beside their base: what each gained, what it cost, curves over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_rlsc.evaluation.measure import Result
from megatron_rlsc.evaluation.statistics import Estimate
from megatron_rlsc.reporting.run import Run, read_run, seconds_of

ACCURACY, LENGTH = "held_out/accuracy", "rollout/response_length"
PANELS = (
    (ACCURACY, "accuracy of a sample, %"),
    ("pass", "pass@{k}, %"),
    ("policy/token_entropy", "token entropy, nats"),
    (LENGTH, "response length, tokens"),
)
WAITED = "evaluate"
"""The phase that is no part of training."""
_STYLE = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e3e3e3",
    "axes.prop_cycle": matplotlib.cycler(
        color=["#0b6e4f", "#d1495b", "#3a6ea5", "#edae49", "#7d5ba6", "#8d8d8d", "#00a6a6", "#b07d62"]
    ),
}


def read_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """{folder's name: run}. Raises ValueError where one has no step, or no evaluation of held-out problems."""
    runs = {folder.name: read_run(folder) for folder in folders}
    for run in runs.values():
        if not run.steps or not run.series(ACCURACY):
            raise ValueError(f"{run.folder} has no steps with --eval-interval: nothing to compare")
    if len(runs) < len(folders):
        raise ValueError(f"two of the runs have one name: {' '.join(folder.name for folder in folders)}")
    return runs


def cost_table(runs: Mapping[str, Run]) -> str:
    """Markdown: each run's budget, its cost, and its held-out problems before and after."""
    k = _samples(runs)
    lines = [
        f"| run | responses | response tokens | minutes | accuracy: base | after | 95 % | pass@{k}: base | after "
        "| entropy | length |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        before, after = run.held_out[0], run.held_out[-1]
        a_step = run.setting("data", "prompts_per_step") * run.setting("rollout", "samples_per_prompt")
        tokens = sum(a_step * row[LENGTH] for row in run.steps)
        minutes = sum(s for row in run.steps for phase, s in seconds_of(row).items() if phase != WAITED) / 60
        first, last = run.steps[0], run.steps[-1]
        low, high = after[f"{ACCURACY}_low"], after[f"{ACCURACY}_high"]
        lines.append(
            f"| {name} | {a_step * len(run.steps):,} | {tokens:,.0f} | {minutes:.1f} | {before[ACCURACY]:.1f} "
            f"| {after[ACCURACY]:.1f} | [{low:.1f}, {high:.1f}] | {before.get(_pass(k), math.nan):.1f} "
            f"| {after.get(_pass(k), math.nan):.1f} | {first['policy/token_entropy']:.3f} -> "
            f"{last['policy/token_entropy']:.3f} | {first[LENGTH]:.1f} -> {last[LENGTH]:.1f} |"
        )
    return "\n".join(lines) + "\n"


def base_table(base: Mapping[str, Result]) -> str:
    """Markdown: the untrained model at other temperatures. `base`: {greedy or T0.1: result}."""
    lines = ["| base | accuracy | 95 % | pass@k |", "|---|---|---|---|"]
    for how, result in base.items():
        estimate: Estimate = result.accuracy
        best = f"pass@{result.samples} {result.pass_at[result.samples]:.1f}" if result.samples > 1 else ""
        lines.append(f"| {how} | {estimate.value:.1f} | [{estimate.low:.1f}, {estimate.high:.1f}] | {best} |")
    return "\n".join(lines) + "\n"


def draw(runs: Mapping[str, Run], base: Mapping[str, Result], path: Path) -> None:
    """Accuracy, pass@k, entropy and length over the steps, a line a run; the base's accuracies as dashes. PNG or SVG by
    the name of `path`."""
    k = _samples(runs)
    with matplotlib.rc_context(_STYLE):
        canvas = Figure(figsize=(10, 6.4), layout="constrained")
        for axes, (tag, title) in zip(canvas.subplots(2, 2).flat, PANELS):
            tag = _pass(k) if tag == "pass" else tag
            for name, run in runs.items():
                _curve(axes, run, tag, name)
            axes.set_title(title.format(k=k), fontsize=10, loc="left")
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if tag == ACCURACY:
                _base_lines(axes, base)
            if axes.dataLim.y0 >= 0:
                axes.set_ylim(bottom=0)
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(
            handles, labels, loc="outside lower center", ncols=len(labels) if len(labels) <= 6 else 4, frameon=False
        )
        canvas.savefig(path, dpi=110)


def _curve(axes: Axes, run: Run, tag: str, name: str) -> None:
    points = run.series(tag)
    steps, values = [step for step, _ in points], [value for _, value in points]
    (line,) = axes.plot(steps, values, marker="o", markersize=2.5, linewidth=1.5, label=name)
    if tag == ACCURACY:
        low, high = ([value for _, value in run.series(f"{tag}_{end}")] for end in ("low", "high"))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)


def _base_lines(axes: Axes, base: Mapping[str, Result]) -> None:
    """Each with its name beside the axes; where two are near, the lower one's is below."""
    shown: list[float] = []
    for how, result in sorted(base.items(), key=lambda item: -item[1].accuracy.value):
        value = result.accuracy.value
        near = any(abs(value - other) < 6 for other in shown)
        axes.axhline(value, color="#555555", linewidth=1, linestyle="--")
        axes.annotate(
            f"base, {how}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, -1 if near else 1),
            textcoords="offset points",
            va="top" if near else "bottom",
            fontsize=8,
            color="#333333",
        )
        shown.append(value)


def _samples(runs: Mapping[str, Run]) -> int:
    """Of a held-out problem, the fewest of all runs."""
    return min(int(run.setting("train", "eval_samples")) for run in runs.values())


def _pass(k: int) -> str:
    return f"held_out/pass_at_{k}" if k > 1 else ACCURACY
