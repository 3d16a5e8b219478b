"""Responses that are generated while a step trains: whole runs with real vLLM, of one and two ranks.

`make test-faults` kills the sidecar under one of them (test_train_faults.py). Not covered: GPUs, how much time it saves
and what it costs in accuracy (benchmarks/lead.py).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file
from test_train import LEFT_OUT

from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.run_folder.rollbacks import read_rollbacks
from megatron_rlsc.types import Sample

ROOT = Path(__file__).parents[1]
STEPS = 4
QUESTIONS = 4
TINY = (
    "--prompt-template={problem}=",
    "--no-apply-chat-template",
    f"--prompts-per-step={QUESTIONS}",
    "--samples-per-prompt=4",
    "--max-response-length=56",
    "--max-tokens-per-micro-batch=512",
    "--adam-eps=1e-5",
    "--lr=1e-4",
    f"--train-iters={STEPS}",
    "--save-interval=1",
    "--rollout-lead=1",
)
PROGRAM = ("-m", "megatron_rlsc")
RECORDING, ENDING = ((str(ROOT / "tests" / name),) for name in ("recording.py", "ending.py"))
CLOCKS = ("time/", "speed/", "sync/")
"""Figures that differ from one run to the next."""


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def rows(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def learned(self) -> list[dict[str, float]]:
        """The rows without what a clock or a sampler says."""
        return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in self.rows]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "hf" / "model.safetensors")

    def samples(self, step: int) -> list[Sample]:
        return Journal(self.folder / "rollouts").read(step)

    def go(self, *flags: object, program: Sequence[str] = PROGRAM, ranks: int = 1, code: int = 0, **env: str) -> str:
        """What it said. It ends with `code`."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *(torchrun if ranks > 1 else []), *program, *TINY]
        layout = f"--tensor-model-parallel-size={ranks}"
        done = subprocess.run(
            [*command, layout, f"--output-dir={self.folder}", *map(str, flags)],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        said = done.stdout
        assert done.returncode == code, said
        return said


@pytest.fixture(scope="module")
def flags(base_model: Path, sidecar_python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    questions = tmp_path_factory.mktemp("data") / "questions.jsonl"
    questions.write_text("".join(json.dumps({"problem": f"{a}+{1000 - a}"}) + "\n" for a in range(101, 131)))
    return f"--load={base_model}", f"--data-path={questions}", f"--sidecar-python={sidecar_python}"


@pytest.fixture(scope="module")
def run(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps at TP 2, beside evaluations; its events are in events.txt."""
    folder = tmp_path_factory.mktemp("runs") / "lead"
    held_out = ("--eval-interval=2", f"--eval-data-path={ROOT / 'tests' / 'held_out.jsonl'}")
    events = str(folder.with_name("events.txt"))
    run = Run(folder)
    run.go(*flags, *held_out, program=RECORDING, ranks=2, RLSC_EVENTS=events)
    return run


def test_the_next_step_is_generated_while_one_trains(run: Run) -> None:
    """By the order of what happens, whatever the clock says. A step's request is made before the step before is learned
    from, and waited for after; all its groups are there before the next push. Nothing is begun beyond the last step."""
    lines = run.folder.with_name("events.txt").read_text().splitlines()
    groups = [line for line in lines if line.startswith("add")]
    assert sorted(groups) == sorted(f"add call {step}" for step in range(1, STEPS + 1) for _ in range(QUESTIONS))
    expected = ["push call 0"]
    for step in range(1, STEPS):
        expected += [f"begin call {step + 1}", f"learn call {step}", f"learn return {step}"]
        expected += [f"_wait call {step + 1}", f"_wait return {step + 1}", f"push call {step}"]
    expected += [f"learn call {STEPS}", f"learn return {STEPS}", f"push call {STEPS}"]
    assert [line for line in lines if line not in groups] == expected
    for step in range(2, STEPS + 1):
        places = [i for i, line in enumerate(lines) if line == f"add call {step}"]
        assert lines.index(f"begin call {step}") < min(places) and max(places) < lines.index(f"push call {step - 1}")


def test_responses_lag_by_one_step_from_the_second_on(run: Run) -> None:
    for step in range(1, STEPS + 1):
        samples = run.samples(step)
        assert [(s.group, s.sample) for s in samples] == [(g, i) for g in range(QUESTIONS) for i in range(4)]
        assert {sample.made_after for sample in samples} == {max(0, step - 2)}
        assert len({sample.version for sample in samples}) == 1


def test_p_old_is_the_samplers(run: Run) -> None:
    """Every figure of p_old, and the weights of the loss, are of what the sampler said and the journal has. What the
    policy says of the same responses is another thing, but in the first step; and what the sampler says of a fixed
    prompt after each push is the same."""
    for row in run.rows:
        logprobs = [math.fsum(sample.rollout_logprobs) for sample in run.samples(int(row["step"]))]
        p = [math.exp(value) for value in logprobs]
        weights = [value + 0.1 for value in p]
        assert row["confidence/mean"] == pytest.approx(fmean(p), rel=1e-12)
        expected = sum(weights) ** 2 / sum(w * w for w in weights)
        assert row["weights/effective_samples"] == pytest.approx(expected, rel=1e-9)
    first, *later = run.rows
    assert abs(first["rollout/log_ratio"]) < 1e-4 and first["rollout/logprob_difference"] < 1e-3
    assert all(abs(row["rollout/log_ratio"]) > 1e-4 and row["rollout/logprob_difference"] > 1e-3 for row in later)
    assert all(row["sync/probe_difference"] < 1e-3 for row in run.rows)
    assert [row["sync/pushes"] for row in run.rows] == [2, 3, 4, 5]


def test_others_ask_the_sampler_meanwhile(run: Run) -> None:
    held_out = [json.loads(line) for line in (run.folder / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in held_out] == [0, 2, 4]
    shown = [json.loads(line)["step"] for line in (run.folder / "shown.jsonl").read_text().splitlines()]
    assert shown[-1] == STEPS, "one of a step before may have been late"


def test_a_replay_of_its_journal_is_the_same_run(run: Run, flags: tuple[str, ...], tmp_path: Path) -> None:
    """With the same lead; without, p_old would be the policy's, which is refused."""
    replay, again = f"--replay-rollouts={run.folder / 'rollouts'}", Run(tmp_path / "again")
    again.go(*flags, replay, ranks=2)
    assert again.learned == run.learned
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in run.weights.items())
    said = Run(tmp_path / "without").go(*flags, replay, "--rollout-lead=0", code=2)
    assert "step 2: the sampler's log-probability of a token differs" in said


def test_a_run_that_is_killed_learns_from_what_it_had_begun(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Killed while step 2 trains, or waits, when two groups of step 3 are in the journal, and again with two of step 4.
    No response is made twice, each lags as if nothing had been, and what was learned is what the journal says."""
    run = Run(tmp_path / "run")
    journal = Journal(run.folder / "rollouts")
    kept: dict[Path, bytes] = {}
    for resume, groups in ((), 4 + 4 + 2), (("--resume",), 2 + 2):
        end = f"0 SIGKILL journal.py add return {groups}"
        said = run.go(*flags, *resume, program=ENDING, code=-9, RLSC_END=end)
        assert "ending.py: SIGKILL at" in said
        assert all(path.read_bytes() == before for path, before in kept.items() if path.exists())
        kept = {path: path.read_bytes() for path in journal.folder.iterdir()}
    begun = journal.begun_path(4)
    assert kept.keys() == {*(journal.path(step) for step in (1, 2, 3)), begun}
    assert len(set(kept[begun].splitlines())) == 2 * 4
    run.go(*flags, "--resume")
    for step in range(1, STEPS + 1):
        samples = run.samples(step)
        before = kept[journal.path(step) if step < 4 else begun].splitlines()
        assert set(before) <= set(journal.path(step).read_bytes().splitlines())
        assert sorted((s.group, s.sample) for s in samples) == [(g, i) for g in range(QUESTIONS) for i in range(4)]
        assert {sample.made_after for sample in samples} == {max(0, step - 2)}
    again = Run(tmp_path / "again")
    again.go(*flags, f"--replay-rollouts={journal.folder}")
    assert again.learned == run.learned
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in run.weights.items())


def test_a_rollback_drops_what_was_begun(flags: tuple[str, ...], tmp_path: Path) -> None:
    """A guard that finds every step bad: after step 2 the run goes back to the base, and the responses of steps 1, 2
    and 3, which was begun, go aside; those in their place are others, of the base again. After two more it ends."""
    run = Run(tmp_path / "run")
    guard = ("--on-collapse=rollback", "--max-rollbacks=1", "--entropy-floor=100", "--guard-patience=2")
    said = run.go(*flags, *guard, code=2)
    assert "Back to the base" in said and "All 1 rollbacks (--max-rollbacks) are used up" in said
    assert len(read_rollbacks(run.folder)) == 1
    aside = run.folder / "rollbacks" / "01" / "rollouts"
    assert sorted(path.name for path in aside.iterdir()) == [
        "begun-000003.jsonl",
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]
    for step in (1, 2):
        before, after = Journal(aside).read(step), run.samples(step)
        assert {sample.made_after for sample in (*before, *after)} == {0}
        assert not {sample.seed for sample in before} & {sample.seed for sample in after}
        assert not {sample.version for sample in before} & {sample.version for sample in after}


def test_a_push_left_out_is_a_lag_too_many(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The push after step 1 is not made, and said to have been. Step 2 learns from the base's responses as it should,
    step 3 would as well: two steps behind."""
    run, forgetful = Run(tmp_path / "run"), LEFT_OUT.format(tests=str(ROOT / "tests"))
    said = run.go(*flags, program=("-c", forgetful), code=2)
    assert "step 3: group 0, sample 0 is of version" in said
    assert "it lags 2 steps behind, --rollout-lead permits 1" in said
    assert [row["step"] for row in run.rows] == [1, 2]
    assert not Journal(run.folder / "rollouts").path(3).exists()
