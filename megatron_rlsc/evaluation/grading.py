"""Is a response right? Its last \\boxed{} is its answer; math-verify decides, so that 1/2, 0.5 and \\frac12 are one."""

from __future__ import annotations

from functools import cache

from math_verify import parse, verify

BOX = "\\boxed{"


def grade(response: str, answer: str) -> bool:
    """Whether what the response boxes last equals `answer`, in LaTeX or plain text. A response without a box is wrong.

    Main thread only: math-verify sets alarms. What it cannot read or compare within its 5 seconds is wrong; an `answer`
    that it cannot read raises ValueError, since no response would ever be right.
    """
    boxed = last_boxed(response)
    return boxed is not None and verify(list(_parse_answer(answer)), _parse(boxed))


def last_boxed(response: str) -> str | None:
    """What stands in the last \\boxed{} of a response, braces within it balanced; None where none is closed."""
    start = len(response)
    while (start := response.rfind(BOX, 0, start)) >= 0:
        depth, begin = 1, start + len(BOX)
        for i in range(begin, len(response)):
            depth += {"{": 1, "}": -1}.get(response[i], 0)
            if depth == 0:
                return response[begin:i]
    return None


@cache
def _parse_answer(answer: str) -> tuple[object, ...]:
    parsed = _parse(answer)
    if not parsed:
        raise ValueError(f"math-verify cannot read the answer {answer!r}")
    return tuple(parsed)


def _parse(answer: str) -> list[object]:
    """math-verify's expressions for an answer: boxed again, which is where it looks first."""
    return parse(rf"\boxed{{{answer}}}")
