"""benchmarks/side_by_side.md: comparisons and growth as tables."""

from __future__ import annotations

from statistics import median

from sides.compare import Comparison, Entry, ratios, spread
from sides.growth import MICRO_BATCH, TIMES, Growth
from sides.work import Shape

MIB = 2**20


def comparison(title: str, found: Comparison) -> str:
    """A table, ours first."""
    entries = list(found.rounds[0])
    rows = "".join(row(found, entry, entries[0]) for entry in entries)
    tokens = [steps[entries[0]].tokens for steps in found.rounds]
    tried = ", ".join(
        f"{entry.name} {entry.micro_batch}: {step.tokens / step.cost.seconds:.0f} ({step.cost.peak / MIB:.0f} MiB)"
        for entry, step in found.tried.items()
        if entry.micro_batch
    )
    return (
        f"### {title}\n\n{min(tokens)} to {max(tokens)} response tokens a step, {len(found.rounds)} steps of each "
        f"side. Loss and gradient norm: {found.difference:.1e} apart at most. A step had {alone(found):.0%} of a core "
        "at least.\n\n"
        "| side | micro-batch | response tokens/s | times as quick is ours | peak, MiB | of which ours takes |\n"
        "|---|---|---|---|---|---|\n"
        f"{rows}\nTokens/s (and peak) of one step at each micro-batch, by which the best was chosen: {tried}.\n\n"
    )


def alone(found: Comparison) -> float:
    """The least CPU time of a measured step over its seconds: well below 1, and other programs were at work beside."""
    return min(step.cost.cpu / step.cost.seconds for steps in found.rounds for step in steps.values())


def row(found: Comparison, entry: Entry, ours: Entry) -> str:
    steps = [steps[entry] for steps in found.rounds]
    quicker, smaller = ratios(found, entry, ours)
    own = entry == ours
    return (
        f"| {entry.name} | {entry.micro_batch or 'packed'} "
        f"| {spread([step.tokens / step.cost.seconds for step in steps], 1)} "
        f"| {'' if own else spread(quicker, 2)} | {median(step.cost.peak for step in steps) / MIB:.0f} "
        f"| {'' if own else f'{median(smaller):.2f}'} |\n"
    )


def growth(found: list[Growth], shape: Shape) -> str:
    heads = " | ".join(f"{times} x" for times in TIMES)
    rows = ""
    for each in found:
        seconds = " | ".join(f"{cost.seconds:.2f}" for cost in each.costs)
        peaks = " | ".join(f"{cost.peak / MIB:.0f}" for cost in each.costs)
        rows += f"| {each.axis} | {each.name} | s | {seconds} | {each.time_slope:.2f} |\n"
        rows += f"| | | MiB | {peaks} | {each.memory_slope:.2f} |\n"
    return (
        f"## Growth\n\n16 responses of 32 tokens to a prompt of 32, a vocabulary of {shape.vocab_size} and "
        f"{shape.num_hidden_layers} layers of {shape.hidden_size} at 1 x; (a) at micro-batch {MICRO_BATCH}. The slope "
        "is that of the logarithms: 1 is growth with the size, 2 with its square.\n\n"
        f"| what grows | side | | {heads} | slope |\n|---|---|---|{'---|' * len(TIMES)}---|\n{rows}"
    )
