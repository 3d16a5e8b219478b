"""Run folders as a run writes them, without a run: the files alone, with figures that can be foretold."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlsc.config import Config, TrainConfig
from megatron_rlsc.recipe import dump_recipe
from megatron_rlsc.run_folder.journal import Journal
from megatron_rlsc.types import Sample

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)> & \x1b[31mred \\boxed{<b>7</b>}"
"""What a model may say."""
STEPS = 5


def write_run(folder: Path, *, steps: int = STEPS, status: str = "", holder: str = "") -> Path:
    """A run of so many of five steps: loss 1/step, confidence step/10, 3 seconds a step (2 rollout, 1 train)."""
    folder.mkdir(parents=True)
    config = Config(train=TrainConfig(train_iters=STEPS, output_dir=folder))
    (folder / "config.toml").write_text(dump_recipe(config))
    (folder / "status").write_text(f"{status or f'done after step {steps}'}\n")
    (folder / "run.lock").write_text(holder or f"process {os.getpid()} on {socket.gethostname()}")
    write_lines(folder / "metrics.jsonl", *map(figures, range(1, steps + 1)))
    for step in range(1, steps + 1):
        Journal(folder / "rollouts").write(step, [sample(step, group, i) for group in range(2) for i in range(4)])
    return folder


def figures(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1 / step,
        "confidence/mean": step / 10,
        "confidence/identical_share": 0.5,
        "policy/token_entropy": 1 / (step + 1),
        "rollout/response_length": 20.0 + step,
        "rollout/truncated_share": 0.0,
        "guard/unheard_of": float(step % 2),
        "speed/tokens_per_second": 100.0 * step,
        "time/rollout": 2.0,
        "time/train": 1.0,
    }


def sample(step: int, group: int, number: int) -> Sample:
    """`step` tokens, each of log p -1/step^2: log p(y|x) is -1/step."""
    return Sample(
        group=group,
        sample=number,
        prompt_index=group,
        prompt_token_ids=(16, 17),
        response_token_ids=(*[18 + number // 3] * (step - 1), 256),
        rollout_logprobs=(-1 / step**2,) * step,
        finish_reason="stop",
        seed=1,
        version=f"v{step}",
    )


def write_lines(path: Path, *rows: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(folder: Path, verdicts: list[str], *, response: str) -> None:
    """As tools/evaluate.py does: AIME24, greedy, one response a problem."""
    right = [float(verdict == "right") for verdict in verdicts]
    write_lines(
        folder / "aime24" / "greedy" / "samples.jsonl",
        *(
            {
                "sample": 0,
                "question": f"{i}+{i} <i>?</i>",
                "right": [str(2 * i)],
                "response": response,
                "tokens": 7,
                "whole": True,
                "verdict": verdict,
            }
            for i, verdict in enumerate(verdicts)
        ),
    )
    value = 100 * sum(right) / len(right)
    result = {
        "benchmark": "aime24",
        "problems": len(right),
        "samples": 1,
        "temperature": 0.0,
        "accuracy": {"value": value, "low": value - 1, "high": value + 1},
        "pass_at": {"1": value},
        "majority": None,
        "response_length": 7.0,
        "truncated": 0.0,
        "unboxed": 0.0,
        "verdicts": dict(Counter(verdicts)),
        "listed": [],
        "ungradable": [],
        "shares": {str(i): share for i, share in enumerate(right)},
    }
    (folder / "aime24" / "greedy" / "result.json").write_text(json.dumps(result))


def write_everything(folder: Path) -> Path:
    """A run that is done, with all that may be beside it, and with a model that attacks its readers."""
    write_run(folder)
    held_out = [
        {
            "step": step,
            "held_out/accuracy": 40.0 + step,
            "held_out/accuracy_low": 30.0 + step,
            "held_out/accuracy_high": 50.0 + step,
        }
        for step in (0, 5)
    ]
    write_lines(folder / "held_out.jsonl", *held_out)
    answer = {"prompt": f"what is {EVIL}?", "finish_reason": "stop", "tokens": 3}
    shown = [{"step": step, "answers": [answer | {"response": f"{step} {EVIL}"}]} for step in (0, 5)]
    write_lines(folder / "shown.jsonl", *shown)
    write_lines(folder / "guard.jsonl", {"step": 3, "what": "repetition", "text": f"{EVIL} again"})
    write_evaluation(folder / "evaluation" / "base", ["wrong", "right", "wrong", "right"], response=EVIL)
    write_evaluation(folder / "evaluation" / "rlsc", ["right", "wrong", "wrong", "right"], response=f"so: {EVIL}")
    write_lines(folder / "launcher" / "launcher.log")
    (folder / "launcher" / "launcher.log").write_text("first\n2026-11-21 10:00:00 done <b>\n")
    return folder
