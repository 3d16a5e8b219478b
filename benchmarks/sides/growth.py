"""What time and memory of a step grow with: tokens, vocabulary and responses, from 1 to 16 times as many."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_rlsc.types import Sample
from sides.measure import Cost
from sides.processes import Variant, Worker
from sides.work import SIBLINGS, Setup, Shape, samples_of, write_model

TIMES = (1, 2, 4, 8, 16)
SHAPE = Shape(vocab_size=9504, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_key_value_heads=1)
"""16 times its vocabulary is Qwen2.5's."""
PROMPT, RESPONSE, MICRO_BATCH = 32, 32, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """Of one side along one axis."""

    axis: str
    name: str
    costs: list[Cost]
    """[TIMES]"""

    @property
    def time_slope(self) -> float:
        return slope([cost.seconds for cost in self.costs])

    @property
    def memory_slope(self) -> float:
        return slope([cost.peak for cost in self.costs])


def slope(values: Sequence[float]) -> float:
    """Of log value over log size, by least squares: 1 where it grows as the size does, 2 with its square."""
    x = [math.log(times) for times in TIMES]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def axes() -> Iterator[tuple[str, list[tuple[Shape, list[Sample]]]]]:
    """Each with its five sizes."""
    base = [(PROMPT, [RESPONSE] * SIBLINGS)]

    def grown(groups: list[tuple[int, list[int]]], vocabulary: int = SHAPE.vocab_size) -> tuple[Shape, list[Sample]]:
        return replace(SHAPE, vocab_size=vocabulary), samples_of(groups, vocabulary, seed=1)

    yield "response tokens", [grown([(PROMPT, [times * RESPONSE] * SIBLINGS)]) for times in TIMES]
    yield "vocabulary", [grown(base, times * SHAPE.vocab_size) for times in TIMES]
    yield "responses", [grown(base * times) for times in TIMES]


def grow(variants: Sequence[Variant], setup: Setup, *, threads: int, repeats: int) -> list[Growth]:
    """Each side along each axis: the least of so many steps after the first, sides in turn."""
    found: list[Growth] = []
    with tempfile.TemporaryDirectory() as folder:
        for axis, sizes in axes():
            costs: dict[str, list[Cost]] = {variant.name: [] for variant in variants}
            for shape, samples in sizes:
                model = Path(folder) / str(shape.vocab_size)
                if not model.exists():
                    write_model(shape, model)
                for name, cost in least(variants, replace(setup, model=model), samples, threads, repeats).items():
                    costs[name].append(cost)
                    print(f"{axis:16} {name:32} {cost.seconds:7.3f} s {cost.peak / 2**20:7.1f} MiB", flush=True)
            found += [Growth(axis=axis, name=name, costs=each) for name, each in costs.items()]
    return found


def least(
    variants: Sequence[Variant], setup: Setup, samples: list[Sample], threads: int, repeats: int
) -> dict[str, Cost]:
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(variant, setup, threads=threads)) for variant in variants]
        costs: dict[str, list[Cost]] = {variant.name: [] for variant in variants}
        for repeat in range(repeats + 1):
            for worker in workers:
                _, cost = worker.step(samples, MICRO_BATCH)
                if repeat > 0:
                    costs[worker.variant.name].append(cost)
    return {
        name: Cost(**{field.name: min(getattr(cost, field.name) for cost in each) for field in fields(Cost)})
        for name, each in costs.items()
    }
