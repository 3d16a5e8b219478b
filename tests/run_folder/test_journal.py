"""Rollouts on disk: what is written is what is read, and what is no journal is refused with its place.

Not covered: that the loop writes before it learns, and replays (the tests of the loop).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlsc.run_folder.journal import Journal, decode, encode
from megatron_rlsc.types import Prompt, Sample

SAMPLE = Sample(
    group=3,
    sample=1,
    prompt_index=40,
    prompt_token_ids=(5, 6, 7),
    response_token_ids=(8, 2),
    rollout_logprobs=(-0.1, -1e-30),
    finish_reason="stop",
    seed=2**63 - 1,
    version="run 7/é",
)
OTHER = replace(SAMPLE, sample=2, response_token_ids=(9,), rollout_logprobs=(-1 / 3,), finish_reason="length")


def test_samples_come_back_equal_to_the_last_bit() -> None:
    assert decode(encode([SAMPLE, OTHER])) == [SAMPLE, OTHER]
    assert decode(encode([])) == []


def test_a_step_is_a_line_for_each_sample(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "rollouts")
    journal.write(12, [SAMPLE, OTHER])
    lines = (tmp_path / "run" / "rollouts" / "step-000012.jsonl").read_text().splitlines()
    assert [json.loads(line)["response_token_ids"] for line in lines] == [[8, 2], [9]]
    assert journal.read(12) == [SAMPLE, OTHER]


def test_a_step_written_again_replaces_the_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(1, [SAMPLE, OTHER])
    journal.write(1, [OTHER])
    assert journal.read(1) == [OTHER]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001.jsonl"]


def test_an_unfinished_file_is_no_step(tmp_path: Path) -> None:
    (tmp_path / "step-000001.partial").write_bytes(encode([SAMPLE])[:20])
    with pytest.raises(ValueError, match=r"no step-000001.jsonl to replay \(no step-\*.jsonl is there\)"):
        Journal(tmp_path).read(1)


def test_a_step_that_is_absent_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(1, [SAMPLE])
    journal.write(2, [SAMPLE])
    with pytest.raises(ValueError, match=r"no step-000003.jsonl .*step-000001.jsonl to step-000002.jsonl are there"):
        journal.read(3)


def test_an_empty_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "step-000001.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        Journal(tmp_path).read(1)


GOOD = encode([SAMPLE])
FIELDS = json.loads(GOOD)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        GOOD[:-10],
        b"[1, 2]",
        b"7",
        json.dumps({name: value for name, value in FIELDS.items() if name != "seed"}).encode(),
        json.dumps(FIELDS | {"label": 42}).encode(),
        json.dumps(FIELDS | {"response_token_ids": 8}).encode(),
    ],
    ids=["blank", "brace", "truncated", "list", "number", "field missing", "field too many", "no list"],
)
def test_a_line_that_is_no_sample_is_refused_with_its_number(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "step-000001.jsonl"
    path.write_bytes(GOOD + line + b"\n")
    with pytest.raises(ValueError, match=r"step-000001.jsonl, line 2, is no sample of a rollout journal"):
        Journal(tmp_path).read(1)


def test_a_sample_s_length_is_prompt_and_response() -> None:
    assert SAMPLE.length == 5  # 3 + 2
    assert OTHER.length == 4  # 3 + 1


def group(number: int, samples: int = 2) -> list[Sample]:
    return [replace(SAMPLE, group=number, sample=i) for i in range(samples)]


PROMPTS = [Prompt(index=40, text="", token_ids=(5, 6, 7))] * 3


def test_groups_of_a_step_are_there_as_soon_as_they_have_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rollouts")
    assert journal.finished(4, PROMPTS, 2) == {}
    journal.add(4, group(2))
    journal.add(4, group(0))
    assert journal.finished(4, PROMPTS, 2) == {0: group(0), 2: group(2)}
    assert journal.finished(5, PROMPTS, 2) == {}
    journal.write(4, group(0) + group(1) + group(2))
    assert [path.name for path in journal.folder.iterdir()] == ["step-000004.jsonl"]
    assert journal.finished(4, PROMPTS, 2) == {number: group(number) for number in range(3)}


def test_a_group_that_is_not_whole_is_sampled_again(tmp_path: Path) -> None:
    """A line that is cut, with or without what is put behind it; a sibling that is missing; a line of zeros."""
    journal = Journal(tmp_path)
    journal.add(1, group(0))
    journal.add(1, group(1))
    path = journal.begun_path(1)
    path.write_bytes(path.read_bytes()[:-20])
    assert journal.finished(1, PROMPTS, 2) == {0: group(0)}
    journal.add(1, group(2))
    assert journal.finished(1, PROMPTS, 2) == {0: group(0), 2: group(2)}
    path.write_bytes(path.read_bytes() + b"\0" * 100 + b"\n")
    assert journal.finished(1, PROMPTS, 2) == {0: group(0), 2: group(2)}


def test_an_answer_to_another_prompt_is_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add(1, group(0) + group(1))
    others = [PROMPTS[0], replace(PROMPTS[0], token_ids=(5, 6)), replace(PROMPTS[0], index=41)]
    assert journal.finished(1, others, 2) == {0: group(0)}
    assert journal.finished(1, PROMPTS, 3) == {}


def test_what_another_run_would_sample_is_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.write(step, group(0))
    journal.add(4, group(0))
    (tmp_path / "notes-on-run.jsonl").touch()
    journal.forget_after(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes-on-run.jsonl",
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]
