"""Problems from lines and rows, in the forms in which the eight benchmarks circulate; the hub itself is not asked."""

from __future__ import annotations

import json

import pytest

from megatron_rlsc.evaluation.benchmarks import read_benchmarks
from megatron_rlsc.evaluation.problems import Columns, Problem, checksum, problem_of, read_problems
from megatron_rlsc.evaluation.protocols import EVALCHEMY, QWEN25_MATH_COT, own_protocol

KNOWN = read_benchmarks()
PAPER = ("aime24", "math500", "amc23", "gsm8k", "minerva_math", "olympiadbench", "mmlu_stem", "gpqa_diamond")


def read(name: str, row: dict) -> Problem:
    return problem_of(row, KNOWN[name].columns, "here")


@pytest.mark.parametrize(
    ("name", "row", "answers"),
    [
        ("aime24", {"id": 60, "problem": "q", "solution": r"\boxed{1}", "answer": "204"}, ("204",)),
        ("aime24", {"id": 0, "problem": "q", "solution": r"so \boxed{\frac{1}{2}}", "url": "u"}, (r"\frac{1}{2}",)),
        ("math500", {"problem": "q", "answer": r"\left( 3, \frac{\pi}{2} \right)", "level": 2}, None),
        ("amc23", {"id": 0, "question": "q", "answer": 27.0, "url": "u"}, ("27",)),
        ("amc23", {"id": 0, "question": "q", "answer": 0.5}, ("0.5",)),
        ("gsm8k", {"question": "q", "answer": "He has 5+5=<<5+5=10>>10.\n#### 1,000"}, ("1,000",)),
        ("minerva_math", {"problem": "q", "solution": r"$I=\boxed{4.5e33}$ erg/s", "type": "x", "idx": 0}, ("4.5e33",)),
        ("olympiadbench", {"question": "q", "final_answer": ["$2$"], "error": None, "unit": None}, ("2",)),
        ("olympiadbench", {"question": "q", "final_answer": ["1,2"], "is_multiple_answer": True}, ("1,2",)),
    ],
)
def test_a_row_of_each(name, row, answers):
    assert read(name, row).answers == (answers or (row["answer"],))


def test_a_unit_and_a_tolerance():
    row = {"question": "q", "final_answer": ["1.6", "2"], "unit": r"$\mathrm{kg}$", "error": "1e-1, .05"}
    found = read("olympiadbench", row)
    assert (found.answers, found.unit, found.tolerance) == (("1.6", "2"), r"\mathrm{kg}", 0.05)


def test_choices():
    row = {"question": "q", "choices": ["red", "green", "blue", "black"], "answer": 2, "subject": "physics"}
    found = read("mmlu_stem", row)
    assert (found.choices, found.answers) == (("red", "green", "blue", "black"), ("C",))
    assert read("mmlu_stem", row | {"answer": "D"}).answers == ("D",)
    assert read("mmlu_stem", row | {"answer": "green"}).answers == ("B",)


def test_choices_in_an_order_that_only_the_question_gives():
    wrong = {f"Incorrect Answer {i}": f"wrong {i}\n" for i in (1, 2, 3)}
    letters = []
    for i in range(40):
        row = {"Question": f"question {i}", "Correct Answer": "right", **wrong}
        found = read("gpqa_diamond", row)
        assert found.choices["ABCD".index(found.answers[0])] == "right"
        assert sorted(found.choices) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        assert found == read("gpqa_diamond", row)
        letters.append(found.answers[0])
    assert set(letters) == set("ABCD")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("aime24", {"id": 1}, "here: none of problem, question"),
        ("aime24", {"problem": "  ", "answer": "1"}, "here: none of problem, question"),
        ("aime24", {"problem": "q"}, "here: `answer` must be a text, a number or a list of them, not None"),
        ("aime24", {"problem": "q", "answer": True}, "not True"),
        ("aime24", {"problem": "q", "answer": ""}, "not ''"),
        ("aime24", {"problem": "q", "solution": r"\boxed{1"}, "not None"),
        (
            "olympiadbench",
            {"question": "q", "final_answer": ["1"], "error": "some"},
            "the tolerance 'some' is no number",
        ),
        ("mmlu_stem", {"question": "q", "answer": 1}, "`choices` must be a list of 2 to 10 choices, not None"),
        ("mmlu_stem", {"question": "q", "choices": ["a", "b"], "answer": 2}, "`answer` is 2, which is none of the 2"),
        ("mmlu_stem", {"question": "q", "choices": ["a", "a"], "answer": "a a"}, "none of the 2 choices"),
        ("gpqa_diamond", {"Question": "q", "Correct Answer": "a"}, "`Incorrect Answer 1` must be"),
    ],
)
def test_malformed_rows(name, row, said):
    with pytest.raises(ValueError, match=r"^here: ") as caught:
        read(name, row)
    assert said in str(caught.value)


def test_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n\n{"question": "a\u2028b", "answer": 27.0}\n')
    assert read_problems(path) == [
        Problem(question="1+1", answers=("2",)),
        Problem(question="a\u2028b", answers=("27",)),
    ]
    for bad, said in (
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not an object"),
        ('{"problem": "q"}', "line 2: `answer`"),
    ):
        path.write_text(f'{{"problem": "1+1", "answer": "2"}}\n{bad}\n')
        with pytest.raises(ValueError, match=said):
            read_problems(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no problems"):
        read_problems(path)


def test_a_checksum_is_of_the_content():
    rows = [{"problem": "q ", "answer": 1.0, "id": 7}, {"question": "r", "answer": "2"}]
    problems = [problem_of(row, Columns(), "") for row in rows]
    assert checksum(problems) == checksum([problem_of({"question": "q", "answer": "1"}, Columns(), ""), problems[1]])
    assert checksum(problems) != checksum(problems[::-1])
    assert len({problem.key for problem in problems}) == 2


def test_the_papers_benchmarks_are_there():
    assert tuple(KNOWN) == PAPER
    for name, benchmark in KNOWN.items():
        assert benchmark.paper and benchmark.paper.rlsc > benchmark.paper.base, name
        assert benchmark.hub and benchmark.split and benchmark.problems, name


def test_where_a_file_is_found(tmp_path):
    lines = '{"problem": "q", "answer": "1"}\n'
    with pytest.raises(
        ValueError, match=r"has no math500: none of math500\.jsonl, math500/test\.jsonl, math_500\.jsonl"
    ):
        KNOWN["math500"].load(tmp_path, refuse)
    (tmp_path / "MATH-500.jsonl").write_text(lines)
    problems = KNOWN["math500"].load(tmp_path, refuse)
    assert KNOWN["math500"].difference(problems) == "1 problems, and MATH500 has 500"
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500" / "test.jsonl").write_text(lines * 500)
    other = KNOWN["math500"].load(tmp_path, refuse)
    assert "questions or answers differ from those of MATH500" in KNOWN["math500"].difference(other)


def refuse(*name: object) -> list[dict]:
    raise AssertionError("the hub was asked")


def test_the_hub_is_asked_for_what_is_written():
    asked = []

    def rows(*name: object) -> list[dict]:
        asked.append(name)
        return [{"question": "q", "answer": "#### 7"}, {"question": "r"}]

    with pytest.raises(ValueError, match="openai/gsm8k, row 2: `answer`"):
        KNOWN["gsm8k"].load(None, rows)
    assert asked == [("openai/gsm8k", "main", "test", None)]


def test_one_more_is_data(tmp_path):
    path = tmp_path / "more.toml"
    path.write_text('[mine]\ncolumns = { question = ["q"], choices = ["options"] }\nfiles = ["m.jsonl"]\n')
    (tmp_path / "m.jsonl").write_text(json.dumps({"q": "?", "options": ["x", "y"], "answer": 1}) + "\n")
    mine = read_benchmarks(path)["mine"]
    assert mine.load(tmp_path, refuse) == [Problem(question="?", answers=("B",), choices=("x", "y"))]
    with pytest.raises(ValueError, match="mine is on no hub: --data-dir"):
        mine.load(None, refuse)
    path.write_text('[mine]\ncolumn = "q"\n')
    with pytest.raises(ValueError, match=r"more.toml, \[mine\]: .*column"):
        read_benchmarks(path)
    path.write_text("mine = 1")
    with pytest.raises(ValueError, match=r"more.toml, \[mine\]"):
        read_benchmarks(path)


MATHS, CHOICE = (
    Problem(question="{choices} of $2^{3}$?", answers=("8",)),
    Problem(question="Which?", answers=("A",), choices=("one", "two")),
)


def test_evalchemy():
    assert EVALCHEMY.messages(MATHS) == [
        {"role": "user", "content": "Problem: {choices} of $2^{3}$?\nMark your solution with \\boxed\nAnswer:"}
    ]
    assert EVALCHEMY.text(CHOICE).endswith("Problem: Which?\nOptions: A) one, B) two\nAnswer:")
    assert KNOWN["aime24"].repeats == KNOWN["amc23"].repeats == 10 and KNOWN["math500"].repeats == 1


def test_qwen25_math_cot():
    system, user = QWEN25_MATH_COT.messages(CHOICE)
    assert system["content"] == "Please reason step by step, and put your final answer within \\boxed{}."
    assert user["content"] == "Which?\nAnswer Choices: (A) one (B) two"


def test_a_template_of_training():
    assert own_protocol("{problem}=", apply_chat_template=False).text(MATHS) == "{choices} of $2^{3}$?="
    assert own_protocol("Q: {problem}", apply_chat_template=False).text(CHOICE) == (
        "Q: Which?\nAnswer Choices: (A) one (B) two"
    )
