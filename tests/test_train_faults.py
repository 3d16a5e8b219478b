"""A whole run whose sidecars fail under it: it goes on, and its samples are those of its own weights throughout.

`make test-faults`. Not covered: GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlsc.run_folder.journal import Journal

STEPS = 4


def engines(trainer: int) -> list[int]:
    """Process ids of the engines among a trainer's descendants."""
    found, parents = [], [trainer]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            for child in map(int, children.read_text().split()):
                parents.append(child)
                if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return sorted(found)


@pytest.mark.faults
@pytest.mark.parametrize(("replicas", "victims", "lead"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (1, 1, 1), (2, 1, 1)])
def test_a_run_outlives_its_sidecars(
    base_model: Path, sidecar_python: Path, tmp_path: Path, replicas: int, victims: int, lead: int
) -> None:
    """The engines of all replicas, or of one of two, are killed in the second step; with a lead, the third is generated
    then, and what is missing of it is of the weights after the second."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"problem": f"{a}+{1000 - a}"}) + "\n" for a in range(101, 165)))
    folder = tmp_path / "run"
    flags = {
        "load": base_model,
        "data-path": questions,
        "sidecar-python": sidecar_python,
        "output-dir": folder,
        "train-iters": STEPS,
        "prompt-template": "{problem}=",
        "lr": 5e-5,
        "prompts-per-step": 32,
        "samples-per-prompt": 16,
        "max-response-length": 56,
        "sidecar-replicas": replicas,
        "sidecar-max-num-seqs": 16,
        "rollout-lead": lead,
    }
    command = [sys.executable, "-m", "megatron_rlsc", *(f"--{name}={value}" for name, value in flags.items())]
    command.append("--no-apply-chat-template")
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while not (folder / "rollouts" / "step-000001.jsonl").exists():
            assert trainer.poll() is None
            time.sleep(0.02)
        while len((folder / "metrics.jsonl").read_text().splitlines()) < 1:  # the second step has begun
            time.sleep(0.02)
        for victim in engines(trainer.pid)[:victims]:
            os.kill(victim, signal.SIGKILL)
        said, _ = trainer.communicate(timeout=500)
    finally:
        trainer.kill()
    assert trainer.returncode == 0, said
    assert said.count("is lost, it is started again") == victims
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sync/probe_difference" if lead else "rollout/logprob_difference"] < 1e-3 for row in rows)
    for step in range(1, STEPS + 1):
        samples = Journal(folder / "rollouts").read(step)
        assert [(s.group, s.sample) for s in samples] == [(g, i) for g in range(32) for i in range(16)]
        # What had been sampled when the last replica was lost stays, and the rest is of a push of the same weights.
        assert len({sample.version for sample in samples}) <= (2 if step == 2 + lead and victims == replicas else 1)
        behind = {step - 1 - (sample.made_after or 0) for sample in samples}
        if step != 2 + lead:
            assert behind == {min(step - 1, lead)}
        assert behind <= {0, lead}
