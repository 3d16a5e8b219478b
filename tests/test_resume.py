"""A run that is killed, told to end, or finds a damaged checkpoint, goes on and is the run that never stopped.

Real ranks, alone or two under torchrun (TP 2), real checkpoints, and where the rollout is what is cut, real vLLM. The
other runs learn from a journal, so that what they learn from is the same to the last bit. `make test-faults` kills two
ranks in more places. Not covered: GPUs, several nodes (tests/slurm).
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rlsc.batching import pack
from megatron_rlsc.conversion.folders import step_dir, trained_steps
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.types import DataShare

ROOT = Path(__file__).parents[1]
JOURNAL = ROOT / "tests" / "golden" / "journal"
STEPS = 5
FLAGS = (ROOT / "tests" / "golden" / "flags.txt").read_text().split()
SPED = ("time/", "speed/", "sync/pushes")
"""Figures that differ from one run to the next."""


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def rows(self) -> list[dict[str, float]]:
        """Of metrics.jsonl, without what a clock says."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith(SPED)} for row in rows]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "hf" / "model.safetensors")

    @property
    def status(self) -> str:
        return (self.folder / "status").read_text().strip()

    def start(self, *flags: object, end: str = "", ranks: int = 1) -> subprocess.Popen[str]:
        """`end` as ending.py has it."""
        layout = f"--tensor-model-parallel-size={ranks}"
        script = [str(ROOT / "tests" / "ending.py")] if end else ["-m", "megatron_rlsc"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *(torchrun if ranks > 1 else []), *script]
        return subprocess.Popen(
            [*command, *FLAGS, layout, f"--output-dir={self.folder}", "--save-interval=1", *map(str, flags)],
            env=os.environ | {"RLSC_END": end},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def go(self, *flags: object, end: str = "", ranks: int = 1, timeout: float = 300) -> str:
        """Starts and waits; what it said. The run must end as it should: well, or where `end` says."""
        process = self.start(*flags, end=end, ranks=ranks)
        said, _ = process.communicate(timeout=timeout)
        if end:
            assert f"ending.py: {end.split()[1]} at" in said, said
        else:
            assert process.returncode == 0, said
        return said


def replay() -> str:
    return f"--replay-rollouts={JOURNAL}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """The run that nothing happened to, on so many ranks."""

    @functools.cache
    def run(ranks: int) -> Run:
        run = Run(tmp_path_factory.mktemp("runs") / "straight")
        run.go(replay(), ranks=ranks)
        return run

    return run


def require_equal(run: Run, expected: Run) -> None:
    """To the last bit: every step once, the same figures, the same weights."""
    assert run.status == f"done after step {STEPS}"
    assert run.rows == expected.rows
    assert run.weights.keys() == expected.weights.keys()
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in run.weights.items())
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == list(range(1, STEPS + 1))
    assert not [path.name for path in (run.folder / "checkpoints").iterdir() if path.name.startswith(".")]


KILLS = (
    "0 SIGKILL journal.py write call 1",
    "0 SIGKILL policy/policy.py _loss call 2",
    "0 SIGKILL policy/policy.py step return 1",
    "0 SIGKILL tracking.py log return 1",
    "0 SIGKILL policy/save.py seal call 1",
    "0 SIGKILL conversion/folders.py set_latest call 1",
    "0 SIGKILL checkpoints.py deleted return 1",
    "0 SIGKILL folder.py write_status call 2",
)
"""A point in each phase of a step; each run is killed a little further than the one before."""
MORE_KILLS = (
    *KILLS[:2],
    "1 SIGKILL policy/policy.py _loss call 2",
    "0 SIGKILL policy/policy.py forward_backward return 1",
    *KILLS[2:3],
    "1 SIGKILL train.py synchronize return 2",
    *KILLS[3:4],
    "1 SIGKILL policy/save.py begin_save return 1",
    *KILLS[4:6],
    "0 SIGKILL conversion/folders.py set_latest return 2",
    *KILLS[6:7],
    "1 SIGKILL policy/save.py write_behind return 1",
    "0 SIGKILL conversion/hf.py write_hf call 1",
    *KILLS[7:],
)
"""On the rank that has it."""


@pytest.mark.parametrize(
    ("ranks", "kills"), [(1, KILLS), pytest.param(2, MORE_KILLS, marks=pytest.mark.faults)], ids=["alone", "tp2"]
)
def test_a_run_that_is_killed_in_every_phase_is_the_one_that_never_was(
    ranks: int, kills: tuple[str, ...], uninterrupted: Callable[[int], Run], tmp_path: Path
) -> None:
    """One run, killed and resumed each time; every other time it saves behind the next step, and keeps two checkpoints.
    A SIGTERM of torchrun's reaches the rank that was not killed."""
    run = Run(tmp_path / "run")
    for number, end in enumerate(kills):
        way = ("--async-save", "--keep-last=2") if number % 2 else ()
        if "write_behind" in end or "deleted" in end:
            way = ("--async-save", "--keep-last=1")
        run.go(replay(), "--resume", *way, end=end, ranks=ranks)
    run.go(replay(), "--resume", ranks=ranks)
    require_equal(run, uninterrupted(ranks))


@pytest.mark.parametrize(("name", "ranks"), [("SIGTERM", 2), ("SIGUSR1", 1)])
def test_a_signal_in_the_middle_of_a_step(
    name: str, ranks: int, uninterrupted: Callable[[int], Run], tmp_path: Path
) -> None:
    """In the forward pass of step 3's first micro-batch of several: SIGTERM drops the step, SIGUSR1 finishes it."""
    run = Run(tmp_path / "run")
    assert micro_batches(3) > 1
    end = f"* {name} policy/policy.py _loss call {micro_batches(1) + micro_batches(2) + 1}"
    process = run.start(replay(), end=end, ranks=ranks)
    said, _ = process.communicate(timeout=300)
    last = 2 if name == "SIGTERM" else 3
    assert run.status == f"stopped after step {last}: {name}", said
    assert trained_steps(run.folder / "checkpoints") == len(run.rows) == last
    assert (process.returncode == 0) == (name == "SIGUSR1")
    assert not (run.folder / "hf").exists()
    run.go(replay(), "--resume", ranks=ranks)
    require_equal(run, uninterrupted(ranks))


def micro_batches(step: int) -> int:
    """Of a step of this journal at TP 2; _loss is called for each of them once."""
    budget = int(next(flag for flag in FLAGS if "max-tokens" in flag).partition("=")[2])
    samples = Journal(JOURNAL).read(step)
    batch = pack(samples, DataShare(), max_tokens=budget, device=torch.device("cpu"), share_prompts=True)
    return len(batch.micro_batches)


def test_a_stop_file_ends_after_the_step(uninterrupted: Callable[[int], Run], tmp_path: Path) -> None:
    """One that is there before the run begins is honoured, not deleted at the start. EXPORT does not stop it."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    (run.folder / "STOP").touch()
    run.go(replay())
    assert run.status == "stopped after step 0: STOP" and run.rows == []
    (run.folder / "EXPORT").touch()
    run.go(replay(), "--resume", "--export-interval=4")
    assert not (run.folder / "STOP").exists() and not (run.folder / "EXPORT").exists()
    exports = sorted(path.name for path in (run.folder / "exports").iterdir())
    assert exports == ["iter_0000001", "iter_0000004"]
    require_equal(run, uninterrupted(1))


def test_a_damaged_checkpoint_is_passed_over(uninterrupted: Callable[[int], Run], tmp_path: Path) -> None:
    """A byte of step 5's weights, and step 4 cut short: the run, which was done, goes on from step 3, and says so."""
    run = Run(tmp_path / "run")
    run.go(replay())
    checkpoints = run.folder / "checkpoints"
    assert trained_steps(checkpoints) == 5
    shard = max(step_dir(checkpoints, 5).glob("*.distcp"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    (step_dir(checkpoints, 4) / "common.pt").write_bytes(b"cut")
    said = run.go(replay(), "--resume")
    assert f"iter_0000005 is not as it was written: {shard.name} has changed" in said
    assert "iter_0000004 is not as it was written: common.pt has 3 bytes" in said
    assert "resuming after step 3" in said
    require_equal(run, uninterrupted(1))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.go(replay(), "--keep-last=1", "--keep-best=-confidence/mean", "--async-save")
    worst = min(run.rows, key=lambda row: row["confidence/mean"])["step"]
    kept = sorted(path.name for path in (run.folder / "checkpoints").glob("iter_*"))
    assert kept == sorted({f"iter_{int(worst):07d}", f"iter_{STEPS:07d}"}) and len(kept) == 2


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.faults)])
def test_what_was_sampled_of_a_step_is_not_sampled_again(
    name: str, base_model: Path, sidecar_python: Path, tmp_path: Path
) -> None:
    """Cut in the middle of a rollout of 48 prompts, of which vLLM decodes one at a time."""
    questions, run = tmp_path / "questions.jsonl", Run(tmp_path / "run")
    questions.write_text("".join(json.dumps({"problem": f"{a}+{1000 - a}"}) + "\n" for a in range(101, 149)))
    flags = (f"--data-path={questions}", f"--sidecar-python={sidecar_python}", "--prompts-per-step=48")
    flags += ("--sidecar-max-num-seqs=1", "--train-iters=2", "--max-tokens-per-micro-batch=2048")
    process, journal = run.start(*flags, ranks=2), Journal(run.folder / "rollouts")
    begun = journal.begun_path(2)
    while not begun.exists() or b"\n" not in begun.read_bytes():  # a whole group
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for rank in ranks_of(process.pid):
        os.kill(rank, signal.Signals[name])
    said, _ = process.communicate(timeout=300)
    if name == "SIGTERM":
        assert run.status == "stopped after step 1: SIGTERM", said
    had = begun.read_bytes()
    groups = {json.loads(line)["group"] for line in had.split(b"\n")[:-1]}
    assert 0 < len(groups) < 48 and not journal.path(2).exists()

    said = run.go(*flags, "--resume", ranks=2)
    assert said.count("step 2/2 |") == 1
    assert f"step 2 has {len(groups)} of 48 questions in the journal already" in said
    lines = journal.path(2).read_bytes().splitlines()
    assert set(had.split(b"\n")[:-1]) <= set(lines) and not begun.exists()
    samples = journal.read(2)
    assert sorted({sample.group for sample in samples}) == list(range(48))
    assert len({sample.version for sample in samples}) == 2
    again = Run(tmp_path / "again")
    again.go(*flags, f"--replay-rollouts={journal.folder}", ranks=2)
    assert [drop(row, "sync/") for row in again.rows] == [drop(row, "sync/") for row in run.rows]
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in run.weights.items())


def drop(row: dict[str, float], prefix: str) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith(prefix)}


def ranks_of(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"megatron_rlsc" in Path(f"/proc/{child}/cmdline").read_bytes()]
