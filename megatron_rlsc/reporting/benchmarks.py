"""The table of before and after, read from what tools/evaluate.py has written; its arithmetic is evaluation's own."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlsc import evaluation
from megatron_rlsc.evaluation.statistics import Estimate, difference

RESULT = "result.json"
Results = Mapping[tuple[str, str], Mapping[str, Any]]
"""{(benchmark, `greedy` or `T0.6`): result.json}"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One set of problems, answered one way."""

    title: str
    how: str
    """`greedy`, `T=0.6, avg@16`."""
    problems: int
    base: Estimate | None
    rlsc: Estimate | None
    gain: Estimate | None
    """Where both were measured on the same problems."""
    base_length: float | None
    """Mean tokens of a response."""
    rlsc_length: float | None
    paper: str
    """`13.3 → 26.7` of Qwen2.5-Math-7B, where the paper has the set."""


def read_results(folder: Path) -> Results:
    """Of an --output of tools/evaluate.py, what is done; nothing where there is none."""
    found = {}
    for path in sorted(folder.glob(f"*/*/{RESULT}")):
        found[path.parent.parent.name, path.parent.name] = json.loads(path.read_bytes())
    return found


def benchmark_table(base: Results, rlsc: Results) -> list[Row]:
    """A row for whatever either has."""
    known = tomllib.loads((Path(evaluation.__path__[0]) / "benchmarks.toml").read_text())
    rows = []
    for name in dict.fromkeys((*base, *rlsc)):
        one, other = base.get(name), rlsc.get(name)
        some = one or other
        assert some is not None
        benchmark = known.get(name[0], {})
        paper = benchmark.get("paper")
        rows.append(
            Row(
                title=benchmark.get("title", name[0]),
                how=_how(some),
                problems=some["problems"],
                base=_accuracy(one),
                rlsc=_accuracy(other),
                gain=_gain(one, other),
                base_length=_length(one),
                rlsc_length=_length(other),
                paper=f"{paper['base']:.1f} → {paper['rlsc']:.1f}" if paper else "",
            )
        )
    return sorted(rows, key=lambda row: (row.title, row.how != "greedy", row.how))


def _accuracy(result: Mapping[str, Any] | None) -> Estimate | None:
    return None if result is None else Estimate(**result["accuracy"])


def _length(result: Mapping[str, Any] | None) -> float | None:
    return None if result is None else float(result["response_length"])


def _gain(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Estimate | None:
    if one is None or other is None or one["shares"].keys() != other["shares"].keys():
        return None
    return difference(list(one["shares"].values()), [other["shares"][key] for key in one["shares"]])


def _how(result: Mapping[str, Any]) -> str:
    how = "greedy" if result["temperature"] == 0 else f"T={result['temperature']:g}"
    return how if result["samples"] == 1 else f"{how}, avg@{result['samples']}"
