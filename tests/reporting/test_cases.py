"""Which answers stand side by side, and what of them is marked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from folders import write_evaluation, write_run

from megatron_rlsc.reporting.cases import graded_cases, journal_cases, shown_cases, split_answer
from megatron_rlsc.reporting.run import read_run


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("so \\boxed{\\frac{1}{2}}.", ("so ", "\\boxed{\\frac{1}{2}}", ".")),
        ("\\boxed{1} or \\boxed{2}", ("\\boxed{1} or ", "\\boxed{2}", "")),
        ("cut \\boxed{\\frac{1", ("cut ", "\\boxed{\\frac{1", "")),
        ("first\nit is 7\n\n", ("first\n", "it is 7", "\n\n")),
        ("7", ("", "7", "")),
        ("", ("", "", "")),
    ],
)
def test_the_answer_is_the_last_box_or_the_last_line(text: str, parts: tuple[str, str, str]) -> None:
    assert split_answer(text) == parts
    assert "".join(split_answer(text)) == text


def test_graded_cases_show_losses_too(tmp_path: Path) -> None:
    """Of five that were gained three are shown, of three that were lost two; one each of what stayed."""
    base = ["wrong"] * 5 + ["right"] * 3 + ["wrong", "no answer", "right"]
    rlsc = ["right"] * 5 + ["wrong"] * 3 + ["wrong", "wrong", "right"]
    write_evaluation(tmp_path / "base", base, response="a")
    write_evaluation(tmp_path / "rlsc", rlsc, response="b")
    found = graded_cases(tmp_path / "base", tmp_path / "rlsc")
    assert found is not None
    assert [(case.base.verdict, case.rlsc.verdict) for case in found.cases] == [
        *[("wrong", "right")] * 3,
        *[("right", "wrong")] * 2,
        ("wrong", "wrong"),
        ("right", "right"),
    ]
    assert "5 wrong → right, 3 right → wrong, 2 wrong → wrong, 1 right → right" in found.note
    assert graded_cases(tmp_path / "base", tmp_path / "nothing") is None


def test_the_journal_has_cases_where_a_question_was_asked_again(base_model: Path, tmp_path: Path) -> None:
    """Token 18 is `3` to this tokenizer and 19 is `4`: three of four samples say the one, as `sample` has it."""
    folder = write_run(tmp_path / "run")
    shutil.copytree(base_model, folder / "checkpoints" / "hf")
    run = read_run(folder)
    found = journal_cases(run)
    assert found is not None and len(found.cases) == 2
    case = found.cases[0]
    assert case.question == "12" and case.rlsc.answer == "3333"
    assert case.rlsc.note == "3 of 4 said so, 5 tokens" and case.base.note == "4 of 4 said so, 1 tokens"
    assert shown_cases(run) is None
