"""The newcomer's run with and without --rollout-lead 1, over seeds: what it gains, and where its time goes: lead.md.

python benchmarks/lead.py --sidecar-python .venv-sidecar/bin/python

A minute and a half a run on two idle cores. A run that has ended is not made again: the command goes on where it was
ended.
Needs matplotlib, of the `report` extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median

import tyro
from provenance import describe
from recipe_run import ROOT, RecipeRun, RunArgs

RUNS = ROOT / "runs/benchmark-lead"
STEPS, EVAL_INTERVAL, PROBLEMS = 20, 2, 200
RECIPE = "5e-5"
"""The rate of examples/rlsc_tiny.toml."""
PHASES = ("rollout", "train", "sync")
COLOURS = ("tab:blue", "tab:red")
"""Of --rollout-lead 0 and 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Args(RunArgs):
    output: Path = ROOT / "benchmarks/lead.md"
    """The tables."""
    picture: Path = ROOT / "docs/pictures/lead.svg"
    """The curves."""


@dataclass(frozen=True, kw_only=True)
class Run(RecipeRun):
    rate: str
    seed: int
    lead: int

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.rate}-seed-{self.seed}-lead-{self.lead}"

    @property
    def settings(self) -> tuple[object, ...]:
        own = ("--lr", self.rate, "--seed", self.seed, "--rollout-lead", self.lead)
        return (*own, "--train-iters", STEPS, "--eval-interval", EVAL_INTERVAL, "--show-prompts", 0)

    @property
    def seconds(self) -> dict[str, float]:
        """{phase: its median over the steps beside which nothing is evaluated, but for the first and the last, beside
        which nothing is generated}"""
        rows = [row for row in self.rows if "time/evaluate" not in row and 1 < row["step"] < STEPS]
        return {phase: median(row[f"time/{phase}"] for row in rows) for phase in PHASES}

    @property
    def minutes(self) -> list[float]:
        """[STEPS + 1] after each step; one beside which problems are evaluated counts as the median of the others."""
        usual = sum(self.seconds.values())
        steps = [
            usual if "time/evaluate" in row else sum(row[f"time/{phase}"] for phase in PHASES) for row in self.rows
        ]
        return [seconds / 60 for seconds in accumulate(steps, initial=0.0)]


MADE = [
    *(Run(rate=RECIPE, seed=seed, lead=lead) for seed in (1, 2) for lead in (0, 1)),
    *(Run(rate="2e-4", seed=1, lead=lead) for lead in (0, 1)),
]
"""Leads in turn, so that what else the machine does falls on both."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for run in MADE if args.measure else []:
        run.make(args.sidecar_python, PROBLEMS)
        args.output.write_text(page())
    args.output.write_text(page())
    draw(args.picture)
    print(args.output.read_text())


def row_of(run: Run) -> str:
    accuracy = {step: row["held_out/accuracy"] for step, row in run.held_out.items()}
    last, seconds = run.held_out[STEPS], run.seconds
    ratios = [row["rollout/log_ratio"] for row in run.rows[1:] if "rollout/log_ratio" in row]
    token = [row["rollout/log_ratio"] / row["rollout/response_length"] for row in run.rows[1:] if ratios]
    lagged = f"{fmean(ratios):+.3f}; {fmean(token):+.4f}" if ratios else ""
    return (
        f"| {run.rate} | {run.seed} | {run.lead} | {' / '.join(f'{accuracy[step]:.0f}' for step in (0, 4, 8, 12, 16))} "
        f"| {accuracy[STEPS]:.1f} [{last['held_out/accuracy_low']:.1f}, {last['held_out/accuracy_high']:.1f}] "
        f"| {' / '.join(f'{seconds[phase]:.2f}' for phase in PHASES)} | {sum(seconds.values()):.2f} "
        f"| {run.minutes[-1]:.1f} | {lagged} |\n"
    )


def page() -> str:
    """All that was measured, with where and when."""
    return (
        "# Rollouts a step ahead\n\n"
        "Made by `python benchmarks/lead.py` from `examples/rlsc_tiny.toml`: 32 questions x 16 responses a step, no "
        f"label, {STEPS} steps, one rank. Held-out accuracy: greedy, on {PROBLEMS} problems, every {EVAL_INTERVAL} "
        "steps. Seconds: medians of the phases over the steps beside which nothing is evaluated; `rollout` is what the "
        "run waits for responses. Minutes: of all steps, those with an evaluation counted as the median of the others. "
        "Log ratio: mean of log p_theta - log p_old from the second step on, of a response and of a token.\n\n"
        f"{describe('torch', 'megatron-core')}: shared by the trainer's one thread and vLLM's three processes.\n\n"
        "| rate | seed | --rollout-lead | accuracy after 0 / 4 / 8 / 12 / 16 steps, % | after 20, 95 % "
        "| rollout / train / sync, s | a step, s | minutes | log ratio |\n"
        "|---|---|---|---|---|---|---|---|---|\n" + "".join(row_of(run) for run in MADE if run.ended)
    )


def draw(path: Path) -> None:
    """Accuracy over steps and over minutes at the recipe's rate, and where a step's seconds go."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rlsc"  # the same picture, the same file
    from matplotlib import pyplot

    _, (steps, minutes, bars) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    runs = [run for run in MADE if run.ended and run.rate == RECIPE]
    for run in runs:
        accuracy = {step: row["held_out/accuracy"] for step, row in sorted(run.held_out.items())}
        label = f"--rollout-lead {run.lead}" if run.seed == 1 else None
        style = {"color": COLOURS[run.lead], "marker": "o", "markersize": 3, "label": label}
        steps.plot(accuracy.keys(), accuracy.values(), **style)
        minutes.plot([run.minutes[step] for step in accuracy], accuracy.values(), **style)
    steps.set(title="held-out accuracy, %", xlabel="step")
    steps.xaxis.get_major_locator().set_params(integer=True)
    minutes.set(title="held-out accuracy, %", xlabel="minutes of rollout, train and sync")
    steps.legend(loc="lower right")
    names = [f"lead {run.lead}, seed {run.seed}" for run in runs]
    below = [0.0] * len(runs)
    for phase in PHASES:
        seconds = [run.seconds[phase] for run in runs]
        bars.bar(names, seconds, bottom=below, label=phase, width=0.7)
        below = [low + high for low, high in zip(below, seconds)]
    bars.set_title("seconds of a step, median")
    bars.tick_params(axis="x", labelsize=8)
    bars.margins(y=0.15)
    bars.legend(loc="upper center", ncols=len(PHASES))
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
