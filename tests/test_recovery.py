"""Runs that collapse are ended or go back, also where they are killed while they do.

Real ranks that learn from the journal of tests/golden at a rate that drives the token entropy of step 4 to 0.061; the
threshold is put at 0.085, and from step 3 on at a rate 2 ** -13 times as high it is 0.1. Not covered: whether the signs
are those of real collapses (benchmarks/collapse.py), and that vLLM draws other samples for another seed
(tests/rollout/test_client.py: it is another).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import Run, drop, replay

from megatron_rlsc.conversion.folders import set_latest
from megatron_rlsc.run_folder.checkpoints import steps_on_disk
from megatron_rlsc.run_folder.rollbacks import read_rollbacks

COLLAPSING = (
    *("--lr=0.009765625", "--lr-warmup-iters=6", "--max-logprob-difference=1000"),  # the journal is of another policy
    *("--guard-patience=1", "--entropy-floor=0.085", "--agreement-fall=1", "--rollback-rate=0.0001220703125"),
)
"""Powers of two, so that a rate that is lowered and one that is given are the same to the last bit."""
WHY = "nothing is left to sample (policy/token_entropy 0.0614, below 0.085 since step 4)"


@pytest.fixture(scope="module")
def back(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that goes back."""
    run = Run(tmp_path_factory.mktemp("runs") / "back")
    said = run.go(replay(), *COLLAPSING, "--on-collapse=rollback", "--async-save", "--keep-last=1")
    assert f"collapse, after step 4: {WHY}. Back to the checkpoint of step 2, with new samples and 0.0001" in said
    return run


def figures(run: Run, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows]


def test_a_run_goes_back_and_on(back: Run) -> None:
    """--keep-last 1 has kept the sound checkpoint as well. Every step is there once, at its rate, and no push shares
    its number with another: one before the first step, one after each of four, one of step 2's weights again, three."""
    assert back.status == "done after step 5"
    assert figures(back, "step") == [1, 2, 3, 4, 5]
    rate = 0.009765625 / 6
    assert figures(back, "optimizer/learning_rate") == pytest.approx([0, rate, *(n * rate / 2**13 for n in (2, 3, 4))])
    assert figures(back, "sync/pushes") == [2, 3, 7, 8, 9]
    board = EventAccumulator(str(back.folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    seen = [json.loads(line) for line in (back.folder / "guard.jsonl").read_text().splitlines()]
    assert [(line["step"], line["what"]) for line in seen] == [(4, "collapse"), (4, "rollback")]
    assert seen[0]["text"] == WHY
    (rollback,) = read_rollbacks(back.folder)
    assert (rollback.step, rollback.to, rollback.rate, rollback.why) == (4, 2, 2**-13, WHY)


def test_what_was_abandoned_is_kept_aside(back: Run) -> None:
    folder = back.folder / "rollbacks" / "01"
    assert sorted(path.name for path in (folder / "rollouts").iterdir()) == ["step-000003.jsonl", "step-000004.jsonl"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4]
    assert rows[0]["policy/token_entropy"] == figures(back, "policy/token_entropy")[2], "of the same weights"


def require_same(run: Run, expected: Run) -> None:
    """To the last bit, but for how often weights were pushed."""
    assert run.status == expected.status
    assert [drop(row, "sync/") for row in run.rows] == [drop(row, "sync/") for row in expected.rows]
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in run.weights.items())


def test_a_run_is_stopped_and_stays_so_until_something_is_changed(back: Run, tmp_path: Path) -> None:
    """The step is saved. Started again as it is, it ends before a step; from the good checkpoint and at the lower
    rate, by hand, it is the run that went back by itself."""
    run = Run(tmp_path / "run")
    for way in ((), ("--resume",)):
        process = run.start(replay(), *COLLAPSING, "--on-collapse=stop", *way)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 2, said
        assert f"rlsc: error: collapse, after step 4: {WHY}. The run is saved as it is. Write 2 into" in said
        assert run.status.startswith(f"failed: collapse, after step 4: {WHY}")
        assert len(run.rows) == 4 and steps_on_disk(run.folder / "checkpoints") == [1, 2, 3, 4]
    assert "step 5/5" not in said
    set_latest(run.folder / "checkpoints", 2)
    run.go(replay(), *COLLAPSING, f"--lr={0.009765625 / 2**13}", "--on-collapse=stop", "--resume")
    require_same(run, back)


def test_a_run_that_is_killed_while_it_goes_back(back: Run, tmp_path: Path) -> None:
    """When it has decided to, and, made good by the next life, when the later checkpoints are going and their rollouts
    have not: what goes on is the run that was not killed, with its lower rate."""
    run, way = Run(tmp_path / "run"), (*COLLAPSING, "--on-collapse=rollback", "--resume")
    run.go(replay(), *way, end="0 SIGKILL rollbacks.py settle call 2")
    assert len(read_rollbacks(run.folder)) == 1 and len(run.rows) == 4
    run.go(replay(), *way, end="0 SIGKILL checkpoints.py sweep call 1")
    run.go(replay(), *way)
    require_same(run, back)


def test_rollbacks_end_and_all_ranks_take_them_alike(tmp_path: Path) -> None:
    """On two ranks, with a threshold that the journal's own samples are below in step 2, whatever the rate."""
    run = Run(tmp_path / "run")
    strict = ("--guard-patience=1", "--length-floor=0.9", "--max-rollbacks=1", "--max-logprob-difference=1000")
    process = run.start(replay(), *strict, "--on-collapse=rollback", "--kl-interval=1", ranks=2)
    said, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "collapse, after step 2: responses get short" in said and "Back to the base" in said
    assert "All 1 rollbacks (--max-rollbacks) are used up" in said
    assert run.status.startswith("failed: collapse, after step 2")
    assert figures(run, "optimizer/learning_rate") == pytest.approx([5e-6, 5e-6])
    assert figures(run, "kl/token")[0] == 0.0, "the base is the policy of the first step, also when it is so again"
    assert figures(run, "sync/pushes") == [5, 6]
