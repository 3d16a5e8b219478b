"""Which responses are right. Does not cover math-verify itself: see its own tests."""

from __future__ import annotations

import pytest

from megatron_rlsc.evaluation.grading import grade, last_boxed


@pytest.mark.parametrize(
    ("response", "boxed"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and \boxed{4", "3"),  # the last is cut
        (r"\boxed{\boxed{3}", "3"),
        (r"\boxed{}", ""),
        ("3", None),
        ("", None),
    ],
)
def test_last_boxed(response, boxed):
    assert last_boxed(response) == boxed


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"5+8+0=13 4+7+1=12 3+6+1=10 \boxed{1023}", "1023"),
        (r"\boxed{1,023}", "1023"),
        (r"so \boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"first \boxed{3}, but no: \boxed{4}", "4"),
    ],
)
def test_right(response, answer):
    assert grade(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1024}", "1023"),
        (r"first \boxed{3}, but no: \boxed{4}", "3"),
        ("5+8+0=13 4+7+1=12", "12"),  # what math-verify would find in the text of a response that was cut
        ("The answer is 12.", "12"),
        (r"\boxed{}", "12"),
        ("", "12"),
    ],
)
def test_wrong(response, answer):
    assert not grade(response, answer)


def test_an_answer_that_cannot_be_read_is_no_wrong_response():
    with pytest.raises(ValueError, match="cannot read the answer ''"):
        grade(r"\boxed{3}", "")
