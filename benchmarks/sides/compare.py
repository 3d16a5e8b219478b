"""All sides on the same responses, one after the other, round after round: that they agree, and which is how quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from megatron_rlsc.types import Sample
from sides.measure import Cost
from sides.processes import Worker
from sides.work import Lengths, Outcome, draw, response_tokens

AGREEMENT = 1e-5
"""Relative, of loss and gradient norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A line of the table."""

    name: str
    micro_batch: int
    """Responses; 0 where they are packed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One that was measured."""

    entry: Entry
    tokens: int
    """Of the responses."""
    outcome: Outcome
    cost: Cost


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Rounds of the chosen entries."""

    tried: dict[Entry, Step]
    """The steps that chose the micro-batch, and warmed up."""
    rounds: list[dict[Entry, Step]]
    """Ours first."""
    difference: float
    """The largest, of loss and gradient norm, relative."""


def compare(
    workers: Mapping[Entry, Worker], lengths: Lengths, *, vocabulary: int, draws: int, repeats: int, groups: int
) -> Comparison:
    """Every side at its quickest micro-batch, and at those that are shown; raises ValueError where two of them do not
    agree."""
    batches = [draw(lengths, seed=seed, vocabulary=vocabulary, groups=groups) for seed in range(draws)]
    tried = {entry: take(worker, entry, batches[0]) for entry, worker in workers.items()}
    differences = [agree(list(tried.values()))]
    best = quickest(tried)
    chosen = [entry for entry, worker in workers.items() if entry in best or entry.micro_batch in worker.variant.shown]
    rounds = []
    for _ in range(repeats):
        for samples in batches:
            first = len(rounds) % len(chosen)  # none is always behind the same one
            steps = {entry: take(workers[entry], entry, samples) for entry in chosen[first:] + chosen[:first]}
            differences.append(agree(list(steps.values())))
            rounds.append({entry: steps[entry] for entry in chosen})
    return Comparison(tried=tried, rounds=rounds, difference=max(differences))


def take(worker: Worker, entry: Entry, samples: list[Sample]) -> Step:
    outcome, cost = worker.step(samples, entry.micro_batch)
    step = Step(entry=entry, tokens=response_tokens(samples), outcome=outcome, cost=cost)
    print(
        f"{entry.name:32} micro-batch {entry.micro_batch or 'packed':6} {step.tokens:6} tokens {cost.seconds:7.2f} s "
        f"({cost.cpu:.2f}) {cost.peak / 2**20:7.0f} MiB  loss {outcome.loss:.6f}  gradient {outcome.gradient_norm:.6f}",
        flush=True,
    )
    return step


def quickest(tried: dict[Entry, Step]) -> set[Entry]:
    """Of each name."""
    best: dict[str, Entry] = {}
    for entry, step in sorted(tried.items(), key=lambda item: item[1].cost.seconds):
        best.setdefault(step.entry.name, entry)
    return set(best.values())


def agree(steps: Sequence[Step]) -> float:
    """The largest relative difference from the first step; ValueError where it is too large."""
    first = steps[0].outcome
    worst = 0.0
    for step in steps[1:]:
        for what in ("loss", "gradient_norm"):
            expected, found = getattr(first, what), getattr(step.outcome, what)
            difference = abs(found - expected) / abs(expected)
            if not difference <= AGREEMENT:
                raise ValueError(
                    f"{what} of {step.entry} is {found}, that of {steps[0].entry} {expected}: {difference:.1e} apart, "
                    f"where {AGREEMENT:.0e} may be"
                )
            worst = max(worst, difference)
    return worst


def ratios(found: Comparison, entry: Entry, ours: Entry) -> tuple[list[float], list[float]]:
    """(tokens/s of ours over the entry's, peak of ours over the entry's) of each round."""
    pairs = [(steps[ours].cost, steps[entry].cost) for steps in found.rounds]
    return [b.seconds / a.seconds for a, b in pairs], [a.peak / b.peak for a, b in pairs]


def spread(values: Sequence[float], digits: int) -> str:
    """`12.3 (11.9 to 14.0)`: the median and the range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
