"""Which checkpoints a run goes on from, keeps and deletes.

Not covered: what is in them (tests/policy/test_checkpoint.py), and runs that are killed in between (test_resume.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlsc.conversion.folders import TRACKER, set_latest, step_dir
from megatron_rlsc.run_folder.checkpoints import best_of, candidates, deleted, prune, steps_on_disk, sweep


def finished(folder: Path, *steps: int) -> None:
    for step in steps:
        step_dir(folder, step).mkdir(parents=True)
        (step_dir(folder, step) / "metadata.json").write_text("{}")
    set_latest(folder, steps[-1])


def metrics(folder: Path, **figures: list[float]) -> Path:
    """The n-th value is of step n."""
    rows = [{"step": n, **dict(zip(figures, row))} for n, row in enumerate(zip(*figures.values()), start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
    return folder / "metrics.jsonl"


def names(folder: Path, warnings: list[str]) -> list[str]:
    return [path.name for path in candidates(folder, warn=warnings.append)]


def test_a_run_goes_on_from_the_named_one_and_then_from_those_before(tmp_path: Path) -> None:
    """What is newer than the named one was put aside, by a user who rolled back or by a kill."""
    finished(tmp_path, 2, 4, 10, 12)
    (tmp_path / "iter_0000011").mkdir()
    set_latest(tmp_path, 10)
    warnings: list[str] = []
    assert names(tmp_path, warnings) == ["iter_0000010", "iter_0000004", "iter_0000002"] and not warnings


@pytest.mark.parametrize("tracker", ["eleven", "11", ""])
def test_a_name_that_leads_nowhere_is_reported_and_all_are_tried(tracker: str, tmp_path: Path) -> None:
    finished(tmp_path, 2, 4)
    (tmp_path / TRACKER).write_text(tracker)
    warnings: list[str] = []
    assert names(tmp_path, warnings) == ["iter_0000004", "iter_0000002"]
    assert len(warnings) == 1 and str(tmp_path / TRACKER) in warnings[0]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (0, "", [1, 2, 3, 4, 5]),
        (2, "", [4, 5]),
        (9, "", [1, 2, 3, 4, 5]),
        (1, "loss", [2, 5]),
        (1, "-loss", [1, 5]),
        (2, "-loss", [1, 4, 5]),
        (1, "unknown", [5]),
    ],
)
def test_the_newest_and_the_best_stay(keep_last: int, keep_best: str, kept: list[int], tmp_path: Path) -> None:
    finished(tmp_path, 1, 2, 3, 4, 5)
    path = metrics(tmp_path, loss=[0.1, 0.9, 0.8, 0.5, 0.4])
    prune(tmp_path, keep_last=keep_last, keep_best=keep_best, metrics=path)
    assert steps_on_disk(tmp_path) == kept
    assert sorted(path.name for path in tmp_path.glob("*iter_*")) == [step_dir(tmp_path, step).name for step in kept]


@pytest.mark.parametrize(("spared", "kept"), [((), [6]), ((6,), [6]), ((5, 2), [2, 4, 6]), ((0, 4), [4, 6])])
def test_what_the_run_could_go_back_to_stays(spared: tuple[int, ...], kept: list[int], tmp_path: Path) -> None:
    """The newest that is not after it: of 5, that of step 4; of 0, which is the base, none."""
    finished(tmp_path, 2, 4, 6)
    prune(tmp_path, keep_last=1, keep_best="", metrics=tmp_path / "absent.jsonl", spared=spared)
    assert steps_on_disk(tmp_path) == kept


def test_of_equal_figures_the_newest_counts_and_only_of_steps_that_are_there(tmp_path: Path) -> None:
    path = metrics(tmp_path, loss=[9.0, 0.9, 0.9, 0.5])
    assert best_of([2, 3, 4], "loss", path) == {3}
    assert best_of([2, 3, 4], "loss", tmp_path / "absent.jsonl") == set()


def test_what_a_kill_has_left_goes(tmp_path: Path) -> None:
    finished(tmp_path, 1, 2)
    step_dir(tmp_path, 1).rename(deleted(step_dir(tmp_path, 1)))
    (tmp_path / ".iter_0000003.partial-12ab").mkdir()
    (tmp_path / "hf").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "iter_0000002", TRACKER]
