"""Problems with answers, as evaluation alone reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_rlsc.data import read_questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question and what is right."""

    question: str
    answer: str
    """LaTeX or plain text, without `\\boxed`."""


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL whose lines have a `problem` or a `question`, and an `answer`: a text or a number."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [
        Problem(question=question, answer=_answer(json.loads(lines[i]), f"{path}, line {i + 1}"))
        for i, question in read_questions(path).items()
    ]


def _answer(record: dict[str, object], where: str) -> str:
    answer = record.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # AMC23 as it circulates has 27.0 for 27
    if not isinstance(answer, (str, int, float)) or not str(answer).strip():
        raise ValueError(f"{where}: `answer` must be a text or a number, not {answer!r}")
    return str(answer)
