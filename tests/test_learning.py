"""A step's updates through the whole program, from a journal: rewards and siblings reach the loss on every rank.

In the journal's first step 3 questions have 4 different answers each, and one has 4 equal, right ones; one more
response is right. Not covered: gradients (tests/policy/test_objectives.py), and what is gained (run_controls.sh).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.types import Sample

ROOT = Path(__file__).parents[1]
JOURNAL = ROOT / "tests/golden/journal"


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return Journal(JOURNAL).read(1)


@pytest.fixture(scope="module")
def labels(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines at the places of the journal's prompts, with their sums; others between."""
    path = tmp_path_factory.mktemp("labels") / "labelled.jsonl"
    lines = [{"problem": f"{i}+0", "answer": str(i)} for i in range(max(s.prompt_index for s in samples) + 1)]
    for index, answer in zip(dict.fromkeys(s.prompt_index for s in samples), ("546", "834", "1280", "702")):
        lines[index] = {"problem": f"the question of line {index}", "answer": answer}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def learned(base_model: Path, output: Path, *flags: object) -> dict[str, float]:
    """The figures of a run of one step on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_rlsc", f"--load={base_model}", f"--replay-rollouts={JOURNAL}", "--train-iters=1"]
    command += ["--prompt-template={problem}=", "--no-apply-chat-template", f"--output-dir={output}"]
    done = subprocess.run([*command, *map(str, flags)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (output / "metrics.jsonl").read_text().splitlines()
    figures: dict[str, float] = json.loads(line)
    return figures


def test_ttrl_at_pp_2(base_model: Path, tmp_path: Path) -> None:
    """Votes: of 3 ties the first, and all 4 of the third question, whose advantage is 0: 7 of 16 are rewarded, and 12
    weigh 1.5 or -0.5 (1, 0, 0, 0 has mean 1/4 and std 1/2): (3 * (1.5 + 3 * 0.5))^2 / (3 * (2.25 + 3 * 0.25))."""
    figures = learned(base_model, tmp_path / "run", "--objective=ttrl", "--pipeline-model-parallel-size=2")
    assert figures["reward/mean"] == 7 / 16
    assert figures["weights/effective_samples"] == pytest.approx(81 / 9)
    assert figures["optimizer/gradient_norm"] > 0.1 and not figures["weights/weightless"]


def test_verified_at_dp_2(base_model: Path, labels: Path, tmp_path: Path) -> None:
    """5 of 16 are right: all of the third question, and the second response to the last, which alone has weights."""
    figures = learned(base_model, tmp_path / "run", "--objective=verified", f"--data-path={labels}")
    assert figures["reward/mean"] == 5 / 16
    assert figures["weights/effective_samples"] == pytest.approx(9 / 3)


def test_a_question_s_own_mean_over_replicas(base_model: Path, samples: list[Sample], tmp_path: Path) -> None:
    """rlsc-group at DP 2, where no replica has a whole group's p_old before the pass that is made for it."""
    p = [math.exp(sum(sample.rollout_logprobs)) for sample in samples]
    weights = [p[i] / fmean(p[i // 4 * 4 : i // 4 * 4 + 4]) + 0.1 for i in range(16)]
    loss = -fmean(w * math.log(value) for w, value in zip(weights, p))
    figures = learned(base_model, tmp_path / "run", "--objective=rlsc-group")
    assert figures["loss"] == pytest.approx(loss, rel=1e-4)
    assert figures["weights/effective_samples"] == pytest.approx(
        sum(weights) ** 2 / sum(w * w for w in weights), rel=1e-4
    )
    assert "reward/mean" not in figures


def test_labels_that_are_missing_are_said_at_the_start(base_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "unlabelled.jsonl"
    path.write_text('{"problem": "1+1"}\n')
    command = [sys.executable, "-m", "megatron_rlsc", f"--load={base_model}", f"--replay-rollouts={JOURNAL}"]
    command += ["--train-iters=1", "--objective=verified", f"--data-path={path}", f"--output-dir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "rlsc: error:" in done.stderr and f"{path}, line 1" in done.stderr
