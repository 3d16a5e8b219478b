"""At what rate the newcomer's run collapses, what the guard makes of it and of healthy runs: benchmarks/collapse.md.

python benchmarks/collapse.py --sidecar-python .venv-sidecar/bin/python

Four minutes a run on two idle cores. A run that has ended is not made again: the command goes on where it was ended.
Needs matplotlib, of the `report` extra.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from provenance import describe
from recipe_run import ROOT, RecipeRun, RunArgs

from megatron_rlsc.config import GuardConfig
from megatron_rlsc.guard import Finding, Guard
from megatron_rlsc.run_folder.rollbacks import read_rollbacks

RUNS = ROOT / "runs/benchmark-collapse"
HEALTHY, COLLAPSING = "5e-5", "1e-3"
"""The rate of the recipe, and the lowest of those tried at which the run is lost within 8 steps."""
TURN = 10.0
"""Points of held-out accuracy below the best so far: what nobody who trains without labels sees."""
CEILING = 0.08
"""A --kl-ceiling, in nats a token, between these healthy runs and the others: chosen after the fact."""
PROBLEMS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Args(RunArgs):
    output: Path = ROOT / "benchmarks/collapse.md"
    """The tables."""
    picture: Path = ROOT / "docs/pictures/collapse.svg"
    """The curves."""


@dataclass(frozen=True, kw_only=True)
class Run(RecipeRun):
    rate: str
    seed: int
    steps: int
    on_collapse: str
    flags: tuple[str, ...] = ()
    label: str = ""
    """Tells runs apart that are otherwise alike."""

    @property
    def folder(self) -> Path:
        return RUNS / f"{self.rate}-seed-{self.seed}-{self.on_collapse}{self.label}"

    @property
    def settings(self) -> tuple[object, ...]:
        own = ("--lr", self.rate, "--seed", self.seed, "--on-collapse", self.on_collapse)
        return (*own, "--train-iters", self.steps, *self.flags)

    @property
    def accuracy(self) -> dict[int, float]:
        """{step: held-out accuracy after it, in percent}"""
        return {step: row["held_out/accuracy"] for step, row in self.held_out.items()}

    @property
    def ended(self) -> bool:
        """A run that ends in a collapse has ended too."""
        return self.status.startswith(("done", "failed: collapse"))


EVERY_STEP = ("--eval-interval", "1", "--kl-interval", "1")
GUARDED = [Run(rate=COLLAPSING, seed=seed, steps=12, on_collapse="stop", flags=EVERY_STEP) for seed in (1, 2, 3, 4)]
SWEEP = [Run(rate=rate, seed=1, steps=8, on_collapse="warn", flags=EVERY_STEP) for rate in ("5e-4", COLLAPSING, "3e-3")]
BACK = [
    Run(
        rate=COLLAPSING,
        seed=1,
        steps=12,
        on_collapse="rollback",
        flags=("--eval-interval", "1", "--save-interval", "1", "--rollback-rate", factor),
        label=factor,
    )
    for factor in ("0.5", "0.1")
]
ENDS = ("--eval-interval", "20", "--kl-interval", "5")
WELL = [Run(rate=HEALTHY, seed=seed, steps=20, on_collapse="stop", flags=ENDS) for seed in range(1, 9)]


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    for run in [*GUARDED, *BACK, *WELL, *SWEEP] if args.measure else []:
        run.make(args.sidecar_python, PROBLEMS)
        args.output.write_text(page())
    args.output.write_text(page())
    draw(args.picture)
    print(args.output.read_text())


def trips(run: Run, config: GuardConfig | None = None) -> tuple[int, list[Finding]] | None:
    """The first step after which the guard calls it a collapse, and the signs."""
    guard = Guard(config or GuardConfig())
    for row in run.rows:
        guard.look(row)
        if found := guard.collapse():
            return int(row["step"]), found
    return None


def saturates(run: Run) -> int | None:
    guard = Guard(GuardConfig())
    for row in run.rows:
        guard.look(row)
        if guard.saturates():
            return int(row["step"])
    return None


def turn(run: Run) -> int | None:
    """The first step after which the held-out accuracy is TURN points below the best so far."""
    best = 0.0
    for step, accuracy in sorted(run.accuracy.items()):
        best = max(best, accuracy)
        if accuracy < best - TURN:
            return step
    return None


def row_of(run: Run) -> str:
    rows, accuracy, found = run.rows, run.accuracy, trips(run)
    by_ceiling = trips(run, GuardConfig(kl_interval=1, kl_ceiling=CEILING))
    steps = sorted(accuracy)
    best = max(steps, key=lambda step: accuracy[step])
    signs = "; ".join(f"{one.sign.name} ({one.sign.tag})" for one in found[1]) if found else ""
    divergences = [row["kl/token"] for row in rows if "kl/token" in row]
    divergence = f"{divergences[-1]:.2f}" if divergences else ""
    return (
        f"| {run.rate} | {run.seed} | {len(rows)} | {accuracy[steps[0]]:.0f} | {accuracy[best]:.0f} ({best}) "
        f"| {accuracy[steps[-1]]:.0f} | {turn(run) or ''} | {found[0] if found else ''} | {signs} "
        f"| {by_ceiling[0] if by_ceiling else ''} | {saturates(run) or ''} | {divergence} |\n"
    )


def table(runs: list[Run]) -> str:
    head = (
        "| rate | seed | steps | base, % | best, % (step) | last, % | turn | guard | signs "
        "| with a ceiling | saturated | KL a token |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(row_of(run) for run in runs if run.accuracy)


def went_back(run: Run) -> str:
    """What a run that rolls back did, in a list."""
    lines = [
        f"{i}. After step {back.step}: {back.why}. Back to step {back.to}, rate times {back.rate:g}.\n"
        for i, back in enumerate(read_rollbacks(run.folder), start=1)
    ]
    accuracy = ", ".join(f"{value:.0f}" for _, value in sorted(run.accuracy.items()))
    return (
        "".join(lines) + f"\nHeld-out accuracy in percent, from the base to the last step: {accuracy}. {run.status}.\n"
    )


def kl_seconds() -> str:
    rows = [row for run in (*GUARDED, *SWEEP) for row in run.rows if "time/kl" in row]
    kl, train = (sum(row[f"time/{phase}"] for row in rows) / max(1, len(rows)) for phase in ("kl", "train"))
    return f"{kl:.2f} s a measurement beside {train:.2f} s of training a step, over {len(rows)} steps"


def page() -> str:
    """All that was measured, with where and when."""
    guarded, well = [run for run in GUARDED if run.ended], [run for run in WELL if run.ended]
    stopped = sum(run.status.startswith("failed: collapse") for run in guarded)
    tripped = sum(trips(run) is not None for run in well)
    delays = [found[0] - begun for run in guarded if (found := trips(run)) and (begun := turn(run)) is not None]
    return (
        "# Collapse, and the guard\n\n"
        "Made by `python benchmarks/collapse.py` from `examples/rlsc_tiny.toml`: 32 questions x 16 responses a step, "
        f"no label, one rank. Held-out accuracy: greedy, on {PROBLEMS} problems, which the guard never sees. Turn: the "
        f"first step after which it is {TURN:.0f} points below its best. Guard: the step after which it calls a "
        f"collapse, all thresholds at their defaults; with a ceiling: the same with --kl-ceiling {CEILING}, a "
        "value chosen from these runs. KL: in the last step that measures it.\n\n"
        f"{describe('torch', 'megatron-core')}. The machine was shared with other work.\n\n"
        f"## Where it collapses: no guard (`--on-collapse warn`)\n\n{table([run for run in SWEEP if run.ended])}\n"
        f"## At {COLLAPSING}, `--on-collapse stop`\n\n{table(guarded)}\n"
        f"{stopped} of {len(guarded)} seeds stopped, so many steps after the turn: {', '.join(map(str, delays))}.\n\n"
        f"## At {HEALTHY}, `--on-collapse stop`\n\n{table(well)}\n"
        f"{tripped} of {len(well)} seeds tripped.\n\n"
        f"## At {COLLAPSING}, `--on-collapse rollback`\n\n"
        + "\n".join(f"### `--rollback-rate {run.label}`\n\n{went_back(run)}" for run in BACK if run.ended)
        + "\n"
        f"## What the KL costs\n\n{kl_seconds()}.\n"
    )


FIGURES = {
    "held-out accuracy, %": "",
    "siblings that agree": "confidence/identical_share",
    "different answers / questions": "rollout/distinct_answers",
    "repeated runs of 8 tokens": "rollout/repeated_share",
    "responses cut at the limit": "rollout/truncated_share",
    "KL to the base, nats a token": "kl/token",
}


def draw(path: Path) -> None:
    """Healthy runs and those without a guard, a panel a figure, and where the guard would have ended them."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rlsc"  # the same picture, the same file
    from matplotlib import pyplot

    _, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    colours = {"5e-4": "tab:orange", COLLAPSING: "tab:red", "3e-3": "tab:purple"}
    for panel, (title, tag) in zip(axes.flat, FIGURES.items()):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        for run in (*WELL, *SWEEP):
            colour, rows = colours.get(run.rate, "tab:green"), run.rows
            points = (
                sorted(run.accuracy.items()) if not tag else [(row["step"], row[tag]) for row in rows if tag in row]
            )
            if not points:
                continue
            first_of_its_rate = run.seed == 1
            label = f"lr {run.rate}" if first_of_its_rate else None
            panel.plot(*zip(*points), color=colour, label=label, linewidth=1 if run.rate == HEALTHY else 2)
            if found := trips(run):
                panel.axvline(found[0], color=colour, linestyle=":")
    axes.flat[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
