"""examples/run_controls.sh with real vLLM: what it makes, that it goes on, and that nothing is made twice.

Not covered: what the methods gain (docs/results.md).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.faults


def test_two_runs_their_base_and_the_figure(sidecar_python: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"problem": "{a}+{a}", "answer": "{2 * a}"}}\n' for a in range(101, 105)))
    words = ["bash", "examples/run_controls.sh", "ttrl", "--output-dir", tmp_path / "out", "--eval-data", problems]
    words += ["--trainer-python", sys.executable, "--sidecar-python", sidecar_python]
    words += ["--train-iters=2", "--prompts-per-step", "2"]

    def run() -> str:
        done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run()
    assert "== rlsc\n" in said and "== ttrl-64\n" in said
    page = (tmp_path / "out" / "ttrl.md").read_text()
    # 2 steps of 2 questions, with 16 responses each, and with 64
    assert "| rlsc | 64 | " in page and "| ttrl-64 | 256 | " in page
    assert "| greedy | " in page and "| T0.1 | " in page
    assert (tmp_path / "out" / "ttrl.png").is_file()

    (tmp_path / "out" / "ttrl.md").unlink()
    assert "== " not in run(), "a run that is done was made again"
    assert (tmp_path / "out" / "ttrl.md").read_text() == page
