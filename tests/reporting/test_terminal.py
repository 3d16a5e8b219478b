"""What tools/watch.py prints, of folders in every state, and while one changes."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import figures, write_everything, write_lines, write_run
from rich.console import Console

from megatron_rlsc.reporting.page import TILES
from megatron_rlsc.reporting.run import duration, read_run
from megatron_rlsc.reporting.terminal import COLUMNS, TRENDS, WARNED, seconds_left, sparkline, view, warnings
from megatron_rlsc.types import Health, StepStats

ROOT = Path(__file__).parents[2]
WATCH = [sys.executable, str(ROOT / "tools" / "watch.py")]


def printed(folder: Path, *, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(view(read_run(folder), rows=8))
    return file.getvalue()


def watch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WATCH, *map(str, words)], capture_output=True, text=True, timeout=60)


def test_a_run_under_way(tmp_path: Path) -> None:
    """Two of five steps of 3 s each are done: 9 s are left, less what the third has had, and half a minute has gone by
    since; a step is never taken for more than done."""
    folder = write_run(tmp_path / "run", steps=2, status="running")
    run = read_run(folder)
    left = seconds_left(run)
    assert left is not None and 9 - 3 <= left <= 9
    for path in (folder / "metrics.jsonl", folder / "status", folder / "rollouts"):
        os.utime(path, (time.time() - 30,) * 2)
    assert seconds_left(read_run(folder)) == 6
    write_lines(folder / "rollouts" / "begun-000003.jsonl", {"group": 0}, {"group": 1})
    said = printed(folder)
    assert "running" in said and "step 2/5" in said
    assert "left, step 3: 2 of 32 questions answered" in " ".join(said.replace("│", " ").split())
    assert "rollout 2.0 s 67 %" in said and "train   1.0 s 33 %" in said
    assert "0.2000" in said and "200" in said


def test_nothing_of_the_table_is_cut_at_eighty_columns(tmp_path: Path) -> None:
    said = printed(write_run(tmp_path / "run"))
    assert "…" not in said
    assert {len(line) for line in said.splitlines()} == {80}


def test_a_run_that_is_done_and_what_was_seen(tmp_path: Path) -> None:
    """Also that text of the model does not steer the terminal."""
    said = printed(write_everything(tmp_path / "run"), width=200)
    assert "done after step 5" in said and "left" not in said
    assert "guard, step 3: repetition" in said and "\x1b[31m" not in said
    assert "launcher: 2026-11-21 10:00:00 done <b>" in said
    assert "held_out/accuracy" in said


@pytest.mark.parametrize("status", ["stopped after step 2: STOP", "failed: [red]no[/red] room"])
def test_a_run_that_ended_early(status: str, tmp_path: Path) -> None:
    assert status in printed(write_run(tmp_path / "run", steps=2, status=status))


def test_a_run_without_a_step(tmp_path: Path) -> None:
    assert "step 0/5" in printed(write_run(tmp_path / "run", steps=0, status="running"))
    (tmp_path / "launched" / "launcher").mkdir(parents=True)
    assert "it has not begun yet" in printed(tmp_path / "launched")


def test_figures_that_ought_not_to_be_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    assert warnings(read_run(folder)) == []
    bad = {"weights/weightless": 1.0, "rollout/truncated_share": 0.5, "loss": float("nan")}
    write_lines(folder / "metrics.jsonl", figures(1) | bad)
    found = warnings(read_run(folder))
    assert len(found) == 3 and "loss is not finite" in found
    assert "! rollout/truncated_share 0.5: of the responses are cut at the limit" in printed(folder)


def test_words_for_numbers() -> None:
    assert [duration(seconds) for seconds in (45.4, 123, 3723)] == ["45 s", "2:03", "1:02:03"]
    assert sparkline([0, 1, 2, float("nan"), 7]) == "▁▂▃█"
    assert sparkline([3, 3]) == "▁▁" and sparkline([]) == ""
    assert sparkline(list(range(80)), width=4) == "▁▃▆█"


def test_once(tmp_path: Path) -> None:
    done = watch(write_run(tmp_path / "run"), "--once")
    assert done.returncode == 0 and "step 5/5" in done.stdout, done.stderr


def test_a_log_that_knows_ascii_alone(tmp_path: Path) -> None:
    words = [*WATCH, str(write_everything(tmp_path / "run")), "--once"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0 and "step 5/5" in done.stdout, done.stderr


def test_no_run(tmp_path: Path) -> None:
    done = watch(tmp_path / "nowhere", "--once")
    assert done.returncode == 2
    assert done.stderr == f"watch: error: there is no folder {tmp_path}/nowhere: name the --output-dir of a run\n"


def test_it_follows_a_run_to_its_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2, status="running")
    process = subprocess.Popen([*WATCH, str(folder), "--interval=0.1"], stdout=subprocess.PIPE, text=True)
    time.sleep(1)
    assert process.poll() is None
    write_lines(folder / "metrics.jsonl", *map(figures, range(1, 6)))
    (folder / "status").write_text("done after step 5\n")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and "step 5/5" in said


def test_it_needs_no_torch() -> None:
    code = "import sys, megatron_rlsc.reporting.terminal, megatron_rlsc.reporting.page; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_the_figures_that_are_looked_for_are_there() -> None:
    """Under the names that a step logs; those of held-out problems are tests/test_held_out.py's."""
    wanted = {tag for tag, *_ in (*COLUMNS, *WARNED, *TILES)} | set(TRENDS)
    records = [field for record in (Health, StepStats) for field in dataclasses.fields(record)]
    assert wanted - {field.metadata["tag"] for field in records if field.metadata} == {"held_out/accuracy"}
