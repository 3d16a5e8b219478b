"""Case studies: one question, what the base answered and what the trained model answers, with the answer marked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlsc.reporting.responses import journaled_steps
from megatron_rlsc.reporting.run import Run, read_lines
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.run_folder.names import CHECKPOINTS, ROLLOUTS
from megatron_rlsc.types import Sample

BOX = "\\boxed{"
PER_KIND = {("wrong", "right"): 3, ("right", "wrong"): 2, ("wrong", "wrong"): 1, ("right", "right"): 1}
"""{(base, rlsc): cases that are shown of them}: also of those that speak against the run."""
UNGRADED = 4
"""Cases of prompts that nobody grades."""
JOURNAL_STEPS = 64
"""The last ones, in which a question of the first step is looked for."""
_HEAD = re.compile(rb'"prompt_index":(\d+)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A response in three parts."""

    before: str
    answer: str
    """The last box, or without one the last line that is not empty."""
    after: str
    verdict: str = ""
    """`right`, `wrong`, ...; empty where nobody graded it."""
    note: str = ""
    """`41 tokens`, `12 of 16 said so`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    question: str
    right: str
    """The problem's own answer; empty where there is none."""
    base: Said
    rlsc: Said


@dataclass(frozen=True, kw_only=True, slots=True)
class Cases:
    """Of one source."""

    title: str
    note: str
    cases: tuple[Case, ...]


def graded_cases(base: Path, rlsc: Path) -> Cases | None:
    """Of two --outputs of tools/evaluate.py: the first set of problems that both have, greedy where they have it so."""
    both = [path.parent.relative_to(base) for path in base.glob("*/*/samples.jsonl")]
    both = [name for name in both if (rlsc / name / "samples.jsonl").is_file()]
    if not both:
        return None
    name = min(both, key=lambda name: (name.name != "greedy", str(name)))
    old, new = ({(str(s["question"]), s["sample"]): s for s in _samples(folder / name)} for folder in (base, rlsc))
    kinds: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for key in old:
        if key in new:
            kinds.setdefault((_coarse(old[key]), _coarse(new[key])), []).append(key)
    picked = [key for kind, count in PER_KIND.items() for key in kinds.get(kind, [])[:count]]
    if not picked:
        return None
    counts = ", ".join(f"{len(kinds.get(kind, []))} {kind[0]} → {kind[1]}" for kind in PER_KIND)
    return Cases(
        title=f"{name.parent.name}, {name.name}",
        note=f"The first of each kind, in the order of the problems. There are {counts}.",
        cases=tuple(
            Case(
                question=key[0],
                right=", ".join(map(str, old[key]["right"])),
                base=_graded(old[key]),
                rlsc=_graded(new[key]),
            )
            for key in picked
        ),
    )


def shown_cases(run: Run) -> Cases | None:
    """Of --show-prompts: the first step that has them against the last."""
    if len(run.shown) < 2:
        return None
    first, last = run.shown[0], run.shown[-1]
    later = {answer["prompt"]: answer for answer in last.answers}
    cases = tuple(
        Case(question=old["prompt"], right="", base=_plain(old), rlsc=_plain(later[old["prompt"]]))
        for old in first.answers
        if old["prompt"] in later
    )
    where = "the base" if first.step == 0 else f"the weights after step {first.step}"
    note = f"Greedy answers of {where} and of the weights after step {last.step}, to prompts that never change."
    return Cases(title="fixed prompts", note=note, cases=cases) if cases else None


def journal_cases(run: Run) -> Cases | None:
    """Questions of the first step that were asked again: what most samples said, and how many. Loads the tokenizer."""
    folder = run.folder / ROLLOUTS
    steps = journaled_steps(folder)
    for step in reversed(steps[1:][-JOURNAL_STEPS:]):
        shared = _questions(folder, steps[0]) & _questions(folder, step)
        if shared:
            break
    else:
        return None
    from megatron_rlsc.tokenizer import load_tokenizer  # and torch with it

    tokenizer = load_tokenizer(run.folder / CHECKPOINTS / "hf")

    def text(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    groups = [_by_question(Journal(folder).read(number), shared) for number in (steps[0], step)]
    picked = [index for index in groups[0] if index in groups[1]][:UNGRADED]
    return Cases(
        title="questions that were asked twice",
        note=f"What most of the samples said in step {steps[0]}, which the base answered, and in step {step}.",
        cases=tuple(
            Case(
                question=text(groups[0][index][0].prompt_token_ids),
                right="",
                base=_mode(groups[0][index], text),
                rlsc=_mode(groups[1][index], text),
            )
            for index in picked
        ),
    )


def split_answer(text: str) -> tuple[str, str, str]:
    """What is before the answer, the answer, and what is after it."""
    begin = text.rfind(BOX)
    if begin >= 0:
        depth = 1
        for end in range(begin + len(BOX), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[:begin], text[begin : end + 1], text[end + 1 :]
        return text[:begin], text[begin:], ""
    body = text.rstrip()
    begin = body.rfind("\n") + 1
    return text[:begin], body[begin:], text[len(body) :]


def _said(text: str, *, verdict: str = "", note: str) -> Said:
    before, answer, after = split_answer(text)
    return Said(before=before, answer=answer, after=after, verdict=verdict, note=note)


def _graded(sample: dict[str, Any]) -> Said:
    cut = "" if sample["whole"] else ", cut"
    return _said(str(sample["response"]), verdict=str(sample["verdict"]), note=f"{sample['tokens']} tokens{cut}")


def _plain(answer: Any) -> Said:
    cut = ", cut" if answer["finish_reason"] == "length" else ""
    return _said(answer["response"], note=f"{answer['tokens']} tokens{cut}")


def _mode(samples: Sequence[Sample], text: Callable[[Sequence[int]], str]) -> Said:
    ((token_ids, count),) = Counter(sample.response_token_ids for sample in samples).most_common(1)
    return _said(text(token_ids), note=f"{count} of {len(samples)} said so, {len(token_ids)} tokens")


def _coarse(sample: dict[str, Any]) -> str:
    return "right" if sample["verdict"] == "right" else "wrong"


def _samples(folder: Path) -> list[dict[str, Any]]:
    needed = ("question", "sample", "right", "response", "tokens", "whole", "verdict")
    return read_lines(folder / "samples.jsonl", lambda line: {key: line[key] for key in needed})


def _questions(folder: Path, step: int) -> set[int]:
    """Lines of the prompt file that a step asked, without reading its log-probabilities."""
    with Journal(folder).path(step).open("rb") as file:
        return {int(found[1]) for line in file if (found := _HEAD.search(line, 0, 200))}


def _by_question(samples: Sequence[Sample], wanted: set[int]) -> dict[int, list[Sample]]:
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.prompt_index in wanted:
            groups.setdefault(sample.prompt_index, []).append(sample)
    return groups
