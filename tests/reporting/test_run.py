"""A run's folder is read in every state that it may be in. Real runs are read in tests/test_train.py."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from folders import figures, write_everything, write_lines, write_run

from megatron_rlsc.reporting.run import read_run


def test_what_a_run_has_written(tmp_path: Path) -> None:
    run = read_run(write_everything(tmp_path / "run"))
    assert (run.state, run.last, run.total) == ("done", 5, 5)
    assert run.series("confidence/mean") == [(step, step / 10) for step in range(1, 6)]
    assert run.series("held_out/accuracy") == [(0, 40.0), (5, 45.0)]
    assert run.tags[-1] == "held_out/accuracy_high" and "guard/unheard_of" in run.tags
    assert run.setting("objective", "alpha") == 0.1
    assert [line.step for line in run.shown] == [0, 5]
    assert [(one.step, one.what) for one in run.findings] == [(3, "repetition")]
    assert run.launcher == "2026-11-21 10:00:00 done <b>"
    assert run.sampled is None


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no run's folder: it has no config\.toml"):
        read_run(tmp_path)


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    """A launcher makes its folder before the run does."""
    (tmp_path / "launcher").mkdir()
    run = read_run(tmp_path)
    assert (run.state, run.last, run.steps, run.idle_seconds) == ("unknown", 0, (), 0.0)


def test_lines_that_are_written_at_this_moment(tmp_path: Path) -> None:
    """Half of a line, half of a character, a line that is no object, figures that are no numbers."""
    folder = write_run(tmp_path / "run", steps=2, status="running")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"step": 3, "loss": NaN, "note": "x"}\n{"step": 4, "loss": 0.1, "conf\xc3')
    (folder / "held_out.jsonl").write_text('{"step": 0, "held_out/accu')
    (folder / "guard.jsonl").write_text('{"step": 1}\n{"step": 1, "what": "x", "text": "y"}\n{"st')
    write_lines(folder / "rollouts" / "begun-000004.jsonl", {"group": 0}, {"group": 0}, {"group": 3})
    with (folder / "rollouts" / "begun-000004.jsonl").open("a") as file:
        file.write('{"group": 5, "sam')
    run = read_run(folder)
    assert [row["step"] for row in run.steps] == [1, 2, 3]
    assert "note" not in run.steps[-1]
    assert run.held_out == () and len(run.findings) == 1 and run.sampled == 2


def test_a_step_that_was_made_again_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    write_lines(folder / "metrics.jsonl", figures(2), figures(1), {"step": 2, "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_run(folder).steps] == [(1, 1.0), (2, 9.0)]


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("running", "running"),
        ("stopped after step 2: STOP", "stopped"),
        ("failed: no room", "failed"),
        ("done after step 5", "done"),
        ("", "done"),
    ],
)
def test_the_status_says_how_it_is(status: str, state: str, tmp_path: Path) -> None:
    assert read_run(write_run(tmp_path / "run", status=status)).state == state


def test_a_process_that_is_gone_has_crashed(tmp_path: Path) -> None:
    """Where it ran here; of another machine nobody can say."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for host, state in ((socket.gethostname(), "crashed"), ("node9", "running")):
        folder = write_run(tmp_path / host, status="running", holder=f"process {gone.pid} on {host}")
        assert read_run(folder).state == state
