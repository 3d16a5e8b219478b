"""How often grading errs where that can be known: a benchmark's own answers against themselves, and against each other.

python benchmarks/grading.py --data-dir data          # benchmarks/grading.md

Every answer, boxed, must be right for its own problem; and for every problem with another answer it must be wrong, or
the pair is listed, to be looked at: some are one answer written in two ways.
"""

from __future__ import annotations

import itertools
import logging
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from provenance import describe

from megatron_rlsc.evaluation.benchmarks import Benchmark, read_benchmarks
from megatron_rlsc.evaluation.grading import grade
from megatron_rlsc.evaluation.problems import Problem

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    data_dir: Path
    """Folder of the benchmarks' files."""
    benchmarks: tuple[str, ...] = ("aime24", "amc23", "math500")
    """By name; those with choices have nothing to compare."""
    output: Path = ROOT / "benchmarks/grading.md"
    """The page."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    known = read_benchmarks()
    rows, pairs = [], []
    for name in args.benchmarks:
        row, equal = measure(known[name], args.data_dir)
        rows.append(row)
        pairs += [f"- {known[name].title}: `{one}` for `{other}`\n" for one, other in equal]
    args.output.write_text(page(rows, pairs))
    print(args.output.read_text())


def measure(benchmark: Benchmark, data_dir: Path) -> tuple[str, list[tuple[str, str]]]:
    """A row of the table, and the pairs of answers that are taken for one."""
    problems = benchmark.load(data_dir, no_hub)
    right = sum(grade(f"so it is \\boxed{{{', '.join(p.answers)}}}.", p).verdict == "right" for p in problems)
    answers = sorted({p.answers for p in problems})
    pairs = list(itertools.permutations(answers, 2))
    with ProcessPoolExecutor(initializer=logging.disable) as pool:
        verdicts = list(pool.map(is_right, pairs, chunksize=500))
    equal = [(", ".join(one), ", ".join(other)) for (one, other), ok in zip(pairs, verdicts) if ok]
    row = f"| {right} of {len(problems)} | {len(equal)} of {len(pairs)} |\n"
    return f"| {benchmark.title} | {benchmark.difference(problems) or 'yes'} {row}", equal


def is_right(pair: tuple[tuple[str, ...], tuple[str, ...]]) -> bool:
    given, answers = pair
    return grade(f"\\boxed{{{', '.join(given)}}}", Problem(question="", answers=answers)).verdict == "right"


def no_hub(*name: object) -> list[dict[str, object]]:
    sys.exit("grading: error: --data-dir has no such file")


def page(rows: list[str], pairs: list[str]) -> str:
    return (
        "# Grading\n\n"
        "Made by `python benchmarks/grading.py --data-dir DIR`: every benchmark's own answers, boxed, for their own "
        "problems, where all must be right; and for the problems with any other answer, where those that are right are "
        f"listed below.\n\n{describe('math-verify', 'sympy')}.\n\n"
        "| benchmark | the published problems | right for their own | right for another |\n"
        "|---|---|---|---|\n" + "".join(rows) + "\nAnswers taken for one:\n\n" + "".join(pairs)
    )


if __name__ == "__main__":
    main()
