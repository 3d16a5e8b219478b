"""Is a response right? What it boxes last is its answer; math-verify compares, so that 1/2, 0.5 and \\frac12 are one.

Slow, or stuck, on some answers: `graders.py` calls this in processes that may be ended. Nothing here, nor in what it
calls, evaluates text as code: of math-verify's ways to read an answer only the LaTeX grammar is used, as the other one
(`ExprExtractionConfig`) goes through Python's `eval`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from megatron_rlsc.evaluation.problems import BOX, LETTERS, Problem
from megatron_rlsc.evaluation.verdict import Grade, Verdict

LONGEST = 2000
"""Characters of an answer that is looked at; a longer one is none."""
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]
_IS = re.compile(r"(?:answer|result|solution)\W*(?:is|are|:|=)\W*?(?=[-+.\\$(\[{\w])(.+)", re.IGNORECASE)
_MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_LETTER = re.compile(
    rf"(?:\\(?:text|textbf|mathrm|mathbf)\s*{{)?\W*(?:(?:option|choice)\W*)?([{LETTERS}])(?![\w'])(.*)", re.S | re.I
)
# Not between two digits: 1 1/2 is no 11/2.
_SPACE = re.compile(r"\\[!,;:]|\\(?:left|right|quad|displaystyle)(?![A-Za-z])|(?<!\d)\\?\s+|\\?\s+(?!\s|\d)|\$")


def grade(response: str, problem: Problem, *, whole: bool = True, last_line: bool = True) -> Grade:
    """The verdict on a response.

    Args:
        whole: False where it was cut at the limit: its last line is no conclusion then.
        last_line: whether a response without a box is searched for an answer in its last line.
    """
    boxes = all_boxed(response)
    answer = answer_of(response, whole=whole, last_line=last_line)
    if answer is None:
        return Grade(verdict="no answer", boxed=bool(boxes))
    given = [answer]
    if (several := _how_many(problem)) > 1 and boxes:
        given.append(", ".join(boxes[-several:]))  # each in a box of its own
    verdicts = [_compare(text, problem) for text in given]
    verdict: Verdict = "right" if "right" in verdicts else verdicts[0]
    return Grade(verdict=verdict, answer=answer, boxed=bool(boxes))


def same(first: str, second: str, problem: Problem) -> bool:
    """Whether two responses' answers are one, for a majority vote."""
    if plain(first) == plain(second):
        return True
    if problem.choices:
        one, other = chosen(first, problem.choices), chosen(second, problem.choices)
        return one is not None and one == other
    read = [_read(without_unit(answer, problem.unit)) for answer in (first, second)]
    return all(read) and bool(verify(*read, timeout_seconds=None))


def is_gradable(problem: Problem) -> bool:
    """Whether the problem's own answer can be read, and equals itself: no response would be right otherwise, but one
    that has the same text."""
    if problem.choices:
        return problem.answers[0] in LETTERS[: len(problem.choices)]
    read = _read_own(_own(problem))
    return bool(read) and verify(list(read), list(read), timeout_seconds=None)


def _how_many(problem: Problem) -> int:
    """Answers that a problem has, be they in one text or in several."""
    read = () if problem.choices else _read_own(_own(problem))
    in_one = len(read[0].args) if read and type(read[0]).__name__ == "FiniteSet" else 1
    return max(len(problem.answers), in_one)


def _own(problem: Problem) -> str:
    return without_unit(", ".join(problem.answers), problem.unit)


def _compare(answer: str, problem: Problem) -> Verdict:
    if problem.choices:
        letter = chosen(answer, problem.choices)
        return "unreadable" if letter is None else "right" if letter == problem.answers[0] else "wrong"
    given, right = without_unit(answer, problem.unit), _own(problem)
    if plain(given) == plain(right):
        return "right"
    if not (own := _read_own(right)):
        return "ungradable"
    if not (read := _read(given)):
        return "unreadable"
    bases = {base(text) for text in (given, right)} - {None}
    if len(bases) == 2:  # math-verify takes 21_5 and 21_6 for one
        return "wrong"
    if verify(list(own), read, allow_set_relation_comp=True, timeout_seconds=None):
        return "right"
    return "right" if problem.tolerance and _near(own, read, problem.tolerance) else "wrong"


def _near(one: Sequence[Any], other: Sequence[Any], tolerance: float) -> bool:
    """Whether the numbers of two answers, as many in each, differ by no more than `tolerance`, one by one."""
    first, second = (_numbers(read[0]) for read in (one, other))
    return bool(first) and len(first) == len(second) and all(abs(a - b) <= tolerance for a, b in zip(first, second))


def _numbers(expression: Any) -> list[float]:
    """Ascending; empty where something in it is no real number."""
    parts = (
        list(getattr(expression, "args", ())) if type(expression).__name__ in ("FiniteSet", "Tuple") else [expression]
    )
    right_sides = [part.rhs if type(part).__name__ == "Equality" else part for part in parts]
    if not all(getattr(part, "is_real", False) and getattr(part, "is_number", False) for part in right_sides):
        return []
    return sorted(float(part.evalf()) for part in right_sides)


# What a response gives as its answer.


def answer_of(response: str, *, whole: bool = True, last_line: bool = True) -> str | None:
    """What its last box holds, or else its last line gives; None where that is nothing. See `grade`."""
    answer = last_boxed(response)
    if answer is None and whole and last_line:
        answer = in_last_line(response)
    return None if answer is None or not answer.strip() or len(answer) > LONGEST else answer


def last_boxed(response: str) -> str | None:
    """What stands in the last \\boxed{} of a response, braces within it balanced; None where none is closed."""
    boxes = all_boxed(response)
    return boxes[-1] if boxes else None


def all_boxed(response: str) -> list[str]:
    """What stands in each closed \\boxed{}, in order; of nested ones the innermost, which is the answer."""
    found, open_at = [], []
    depths: list[int] = []
    depth = i = 0
    while i < len(response):
        if response.startswith(BOX, i):
            i += len(BOX)
            depth += 1
            open_at.append(i)
            depths.append(depth)
            continue
        if response[i] == "\\":  # \{ and \} are text
            i += 2
            continue
        if response[i] == "{":
            depth += 1
        elif response[i] == "}":
            if depths and depth == depths[-1]:
                depths.pop()
                found.append((open_at.pop(), i))
            depth = max(depth - 1, 0)
        i += 1
    return [response[a:b] for a, b in found if not any(a < c and d < b for c, d in found)]


def in_last_line(response: str) -> str | None:
    """The answer that the last line of a response gives: after `answer is`, or in its last $...$, or the line itself
    where it is an expression."""
    lines = [line.strip() for line in response.strip().splitlines() if line.strip()]
    if not lines:
        return None
    line = lines[-1].strip("*_ ")
    if said := _IS.search(line):
        line = said[1].strip("*_ ")
    if maths := _MATHS.findall(line):
        return next(group for group in maths[-1] if group)
    line = line.removeprefix("####").strip().rstrip(".").strip("*_ ")
    words = re.findall(r"(?<![\\\w])[A-Za-z]{2,}", line)
    return line if line and (said or not words) else None


def chosen(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of a choice: it is the answer, or stands before it, or the answer is the choice's own text."""
    letters = dict(zip(LETTERS, choices))
    found = _LETTER.fullmatch(answer.strip())
    letter, rest = (found[1].upper(), plain(found[2]).strip("}().:,*")) if found else ("", "")
    if letter in letters and rest in ("", plain(letters[letter]).strip("}().:,*")):
        return letter
    same_text = [letter for letter, choice in letters.items() if plain(choice) == plain(_unwrapped(answer))]
    return same_text[0] if len(same_text) == 1 else None


def plain(text: str) -> str:
    """Without what changes nothing: space, \\left, dollar signs, a full stop at the end, \\dfrac for \\frac."""
    text = _SPACE.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _unwrapped(text).rstrip(".")


def without_unit(answer: str, unit: str) -> str:
    """Of a problem whose answers have one: math-verify knows some units, and no others."""
    return re.sub(rf"(?:\\text{{)?\s*{re.escape(unit)}\s*}}?\s*$", "", answer) if unit else answer


def base(answer: str) -> str | None:
    """The base of a number that has one, as in 4210_{5}."""
    found = re.search(r"\d_{?(\d+)}?\W*$", answer)
    return found[1] if found else None


def _unwrapped(text: str) -> str:
    found = re.fullmatch(r"\\(?:text|textbf|mathrm|mbox)\s*{([^{}]*)}", text.strip())
    return found[1].strip() if found else text


@cache
def _read_own(answer: str) -> tuple[Any, ...]:
    return tuple(_read(answer))


def _read(answer: str) -> list[Any]:
    """math-verify's expressions for an answer: boxed again, which is where it looks first. Empty where it has none."""
    found = parse(rf"\boxed{{{answer}}}", extraction_config=_LATEX, parsing_timeout=None)
    return found if any(not isinstance(one, str) for one in found) else []
