"""--profile on real ranks that replay a journal: traces, tables, the same run, and what a run that is cut leaves.

Not covered: GPUs (tests/test_breakdown.py has a GPU's trace by hand), and rollouts by vLLM.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_resume import Run, micro_batches, replay

from megatron_rlsc.config import TrainConfig
from megatron_rlsc.profile import first_events, open_profile
from megatron_rlsc.tracking import Tracker

STEPS = "--train-iters=3"
KL = ("--kl-interval=1",)
TP2 = KL
PP2 = (*KL, "--tensor-model-parallel-size=1", "--pipeline-model-parallel-size=2")
TRAIN = {
    *("forward-backward", "forward-compute", "backward-compute", "attention", "logprobs", "logprobs-backward"),
    *("all-grads-sync", "gradient-norm", "optimizer", "optimizer-inner-step", "communication"),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Run, str]]:
    """A run on two ranks with such flags, and what it said."""

    @functools.cache
    def run(*flags: str) -> tuple[Run, str]:
        run = Run(tmp_path_factory.mktemp("runs") / "run")
        return run, run.go(replay(), STEPS, *flags, ranks=2)

    return run


def load(path: Path) -> dict:
    with gzip.open(path, "rt") as file:
        return json.load(file)


def table(text: str, title: str) -> list[list[str]]:
    """The rows of a table by its first head, without the heads."""
    (part,) = (part for part in re.split(r"\n\n", text) if part.startswith(f"| {title} "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]


def in_train(event: dict, spans: list[dict]) -> bool:
    """Of a rank, whether an event lies in its training."""
    (train,) = (span for span in spans if span["name"] == "rlsc/train" and span["pid"] == event["pid"])
    return train["ts"] <= event["ts"] < train["ts"] + train["dur"]


@pytest.mark.parametrize("layout", [TP2, PP2], ids=["tp2", "pp2"])
def test_a_profiled_step(layout: tuple[str, ...], done: Callable[..., tuple[Run, str]]) -> None:
    run, said = done(*layout, "--profile")
    assert [path.name for path in (run.folder / "profile").iterdir()] == ["step-000002"]
    folder = run.folder / "profile" / "step-000002"
    assert sorted(path.name for path in folder.iterdir()) == ["phases.md", "rank-0.json.gz", "rank-1.json.gz"]
    text = (folder / "phases.md").read_text()
    assert text in said

    traces = [load(folder / f"rank-{rank}.json.gz") for rank in (0, 1)]
    assert [trace["distributedInfo"]["rank"] for trace in traces] == [0, 1]
    spans = [event for trace in traces for event in trace["traceEvents"] if event["ph"] == "X"]
    named = {event["name"] for event in spans}
    assert {f"rlsc/{name}" for name in ("step", "rollout", "train", "kl", "sync", "gather-weights")} <= named
    assert {f"rlsc/{name}" for name in TRAIN - {"communication"}} <= named and "aten::mm" in named

    phases = {row[0]: float(row[-1]) for row in table(text, "phase")}
    assert list(phases) == ["rollout", "train", "kl", "sync", "between phases", "all"]
    assert sum(phases.values()) == pytest.approx(200, abs=0.05 * len(phases))
    for phase in ("rollout", "train", "kl", "sync"):
        rows = table(text, f"in {phase}")
        assert sum(float(row[-1]) for row in rows) == pytest.approx(100, abs=0.05 * len(rows)), phase
        assert rows[-1][0] == "the rest"
    inside = {row[0].replace("· ", ""): row for row in table(text, "in train")}
    assert inside.keys() >= TRAIN
    assert int(inside["forward-compute"][1]) == micro_batches(2)
    for name in ("forward-backward", "forward-compute", "backward-compute", "optimizer-inner-step"):
        recorded = sum(event["dur"] for event in spans if event["name"] == f"rlsc/{name}" and in_train(event, spans))
        assert float(inside[name][2]) == pytest.approx(recorded / 2 / 1e6, abs=0.00051), name  # a mean of two
    waits = {"forward-recv", "forward-send-backward-recv", "backward-recv"}
    assert (inside.keys() >= waits) == (layout == PP2)
    assert len(table(text, "operator")) == 15
    assert re.search(r"of a process until this step, at its peak: \d{3}\.\d MB", text)


@pytest.mark.parametrize("layout", [TP2, PP2], ids=["tp2", "pp2"])
def test_a_profiled_run_is_the_run(layout: tuple[str, ...], done: Callable[..., tuple[Run, str]]) -> None:
    """To the last bit."""
    (run, _), (plain, said) = done(*layout, "--profile"), done(*layout)
    assert "phase" not in said and not (plain.folder / "profile").exists()
    assert run.rows == plain.rows
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in run.weights.items())


def test_the_seconds_are_the_steps_own(done: Callable[..., tuple[Run, str]]) -> None:
    """Those of metrics.jsonl are the first rank's, by the clock of another library."""
    run, _ = done(*PP2, "--profile")
    row = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[1])
    events = load(run.folder / "profile" / "step-000002" / "rank-0.json.gz")["traceEvents"]
    for phase in ("rollout", "train", "kl", "sync"):
        (span,) = (event for event in events if event["name"] == f"rlsc/{phase}")
        assert span["dur"] / 1e6 <= row[f"time/{phase}"]


def test_a_run_that_is_cut_in_a_profiled_step(done: Callable[..., tuple[Run, str]], tmp_path: Path) -> None:
    """Step 3 is told to end in its forward pass, and killed when it writes its profile: there is none of it each time,
    and that of step 2 stays. What goes on makes it anew, and is the run."""
    run, folder = Run(tmp_path / "run"), tmp_path / "run" / "profile"
    flags = (STEPS, *KL, "--profile", "--profile-step-end=3")
    end = "* SIGTERM policy/policy.py forward_backward call 3"
    run.go(replay(), *flags, end=end, ranks=2)
    assert run.status == "stopped after step 2: SIGTERM"
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    before = {path.name: path.read_bytes() for path in (folder / "step-000002").iterdir()}

    run.go(replay(), *flags, "--resume", end="0 SIGKILL profile.py _describe call 1", ranks=2)
    assert not (folder / "step-000003").exists()
    run.go(replay(), *flags, "--resume", ranks=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
    assert {path.name: path.read_bytes() for path in (folder / "step-000002").iterdir()} == before
    assert load(folder / "step-000003" / "rank-1.json.gz")["traceEvents"]
    plain, _ = done(*TP2)
    assert run.rows == plain.rows
    assert all(torch.equal(tensor, plain.weights[name]) for name, tensor in run.weights.items())


def test_a_run_that_goes_on_behind_the_profiled_steps_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(profile=True, output_dir=tmp_path)
    with Tracker(tmp_path / "metrics.jsonl", tmp_path / "board", start=2, total=20, enabled=True) as tracker:
        for start, told in ((1, ""), (2, "--profile: step 2, the last to be profiled, is done already\n")):
            open_profile(config, None, tracker, start=start)
            assert capsys.readouterr().out == told


def test_a_trace_that_is_too_large_keeps_its_ranges() -> None:
    names = [{"ph": "M", "name": "thread_name"}, {"ph": "X", "name": "rlsc/step", "ts": 0}]
    operators = [{"ph": "X", "name": f"aten::{i}", "ts": i} for i in (3, 1, 2)]
    late = {"ph": "X", "name": "rlsc/sync", "ts": 9}
    events = [*operators, *names, late]
    assert first_events(events, 6) is events
    assert [event["name"] for event in first_events(events, 5)] == [
        *("thread_name", "rlsc/step", "rlsc/sync", "aten::1", "aten::2")
    ]
