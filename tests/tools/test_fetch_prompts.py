"""tools/fetch_prompts.py on local folders, as a data set of the hub lies in its repository.

Not covered: the hub itself, which the tests do not reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlsc.data import read_questions
from megatron_rlsc.evaluation.problems import read_problems

ROOT = Path(__file__).parents[2]
ROWS = [
    {"id": 60, "problem": "What is $1 + 1$?", "answer": "2"},
    {"id": 61, "problem": "What is 2 + 2, é?", "answer": "4"},
    {"id": 62, "problem": "What is 3 + 3?", "answer": "6"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As HuggingFaceH4/aime_2024 is: Parquet, one split."""
    from pyarrow import Table, parquet

    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    parquet.write_table(Table.from_pylist(ROWS), data / "train-00000-of-00001.parquet")
    return tmp_path / "set"


def fetch(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Its cache beside the folder."""
    environment = {"HF_HOME": str(folder.parent / "hf-home"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, "tools/fetch_prompts.py", str(folder), *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_questions_and_answers_as_training_and_evaluation_read_them(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "aime.jsonl"
    done = fetch(folder, "--output", str(output))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}: 3 questions of {folder} (column problem), with answers\n"
    assert list(read_questions(output).values()) == [row["problem"] for row in ROWS]
    assert [problem.answers for problem in read_problems(output)] == [("2",), ("4",), ("6",)]
    assert [path.name for path in output.parent.iterdir()] == ["aime.jsonl"]


def test_another_column_and_repeated_questions(folder: Path, tmp_path: Path) -> None:
    lines = [{"q": "a?", "answer": 1}, {"q": "b?", "answer": 2}, {"q": " a? ", "answer": 1}]
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused = fetch(folder, "--output", str(tmp_path / "out.jsonl"))
    assert refused.returncode == 2
    assert "no column problem or question: there are q, answer. --field names the one" in refused.stderr
    assert not (tmp_path / "out.jsonl").exists()

    done = fetch(folder, "--output", str(tmp_path / "out.jsonl"), "--field", "q")
    assert "2 questions" in done.stdout and "1 repeated ones are left out" in done.stdout
    assert list(read_questions(tmp_path / "out.jsonl").values()) == ["a?", "b?"]


def test_splits_are_named_and_chosen(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(
        (folder / "data" / "train-00000-of-00001.parquet").read_bytes()
    )
    output = str(tmp_path / "out.jsonl")
    assert "has the splits train, test: name one with --split" in fetch(folder, "--output", output).stderr
    assert "has no split dev, but train, test" in fetch(folder, "--output", output, "--split", "dev").stderr
    assert fetch(folder, "--output", output, "--split", "test").returncode == 0


def test_what_is_there_is_not_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    refused = fetch(folder, "--output", str(output))
    assert refused.returncode == 2 and "is there and differs" in refused.stderr
    assert output.read_text() == "mine\n"
    assert fetch(folder, "--output", str(output), "--overwrite").returncode == 0
    assert len(read_questions(output)) == 3


def test_a_row_without_a_question(folder: Path, tmp_path: Path) -> None:
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    (folder / "data" / "train.jsonl").write_text('{"problem": "a?"}\n{"problem": null}\n')
    refused = fetch(folder, "--output", str(tmp_path / "out.jsonl"))
    assert refused.returncode == 2 and "row 2: problem holds None, which is no question" in refused.stderr


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused = fetch(tmp_path / "nothing", "--output", str(tmp_path / "out.jsonl"))
    assert refused.returncode == 2 and refused.stderr.startswith("fetch_prompts: error:")
    assert "Traceback" not in refused.stderr
