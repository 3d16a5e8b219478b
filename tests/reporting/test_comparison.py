"""Runs beside each other: the table by hand, the curves as a picture, and what cannot be compared.

Not covered: how the picture looks, and the runs themselves, which tests/test_controls.py makes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from folders import write_evaluation, write_lines, write_run

from megatron_rlsc.config import Config, DataConfig, RolloutConfig, TrainConfig
from megatron_rlsc.recipe import dump_recipe

ROOT = Path(__file__).parents[2]


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/compare_runs.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def evaluated(folder: Path, *, accuracy: float, samples: int) -> Path:
    """Five steps of 2 questions x 4 responses; 40 % before, `accuracy` after, and as much again of pass@4."""
    write_run(folder)
    config = Config(
        data=DataConfig(prompts_per_step=2),
        rollout=RolloutConfig(samples_per_prompt=4),
        train=TrainConfig(
            train_iters=5, output_dir=folder, eval_interval=5, eval_data_path=folder, eval_samples=samples
        ),
    )
    (folder / "config.toml").write_text(dump_recipe(config))
    rows = [
        {
            "step": step,
            "held_out/accuracy": value,
            "held_out/accuracy_low": value - 5,
            "held_out/accuracy_high": value + 5,
            "held_out/pass_at_4": 2 * value,
        }
        for step, value in ((0, 40.0), (5, accuracy))
    ]
    write_lines(folder / "held_out.jsonl", *rows)
    return folder


def test_gains_and_costs(tmp_path: Path) -> None:
    """5 steps of 8 responses are 40, their tokens 8 x (21 + 22 + 23 + 24 + 25) = 920; 5 x 3 s are 0.25 minutes."""
    runs = [evaluated(tmp_path / name, accuracy=value, samples=4) for name, value in (("ours", 45.0), ("other", 41.0))]
    write_evaluation(tmp_path / "base", ["right", "wrong"], response="")
    done = compare(*runs, "--base", tmp_path / "base", "--output", tmp_path / "out" / "both", "--title", "Ours")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "both.md").read_text()
    assert page.startswith("# Ours\n\n![curves](both.png)\n")
    lengths = "0.500 -> 0.167 | 21.0 -> 25.0 |"
    assert f"| ours | 40 | 920 | 0.2 | 40.0 | 45.0 | [40.0, 50.0] | 80.0 | 90.0 | {lengths}\n" in page
    assert f"| other | 40 | 920 | 0.2 | 40.0 | 41.0 | [36.0, 46.0] | 80.0 | 82.0 | {lengths}\n" in page
    assert "| greedy | 50.0 | " in page
    assert (tmp_path / "out" / "both.png").read_bytes().startswith(b"\x89PNG")


def test_waiting_for_evaluations_is_no_cost_of_training(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "ours", accuracy=45.0, samples=4)
    rows = [
        {"step": 1, "rollout/response_length": 1.0, "policy/token_entropy": 1.0, "time/train": 60, "time/evaluate": 60}
    ]
    write_lines(run / "metrics.jsonl", *rows)
    assert compare(run, "--output", tmp_path / "both").returncode == 0
    assert "| ours | 8 | 8 | 1.0 | " in (tmp_path / "both.md").read_text()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: [write_run(path / "run")], "has no steps with --eval-interval"),
        (lambda path: [path / "none"], "none"),
        (
            lambda path: [evaluated(path / part / "run", accuracy=1.0, samples=1) for part in "ab"],
            "two of the runs have one name: run run",
        ),
    ],
)
def test_what_cannot_be_compared(make, words: str, tmp_path: Path) -> None:
    done = compare(*make(tmp_path), "--output", tmp_path / "both")
    assert done.returncode == 2 and done.stderr.startswith("compare_runs: error: ") and words in done.stderr
    assert not (tmp_path / "both.md").exists()
