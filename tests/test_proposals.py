"""Proposals fit, are in order, and are lines that a recipe takes.

Not covered: the times (tests/test_timing.py), and that a planned layout trains.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlsc.config import Config, DataConfig, ModelConfig
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.memory import choose_planned_spec
from megatron_rlsc.planning import check_layout, require_fits
from megatron_rlsc.proposals import changed_settings, propose
from megatron_rlsc.recipe import load_recipe
from megatron_rlsc.timing import GPUS, Work

ROOT = Path(__file__).parent.parent
A100 = GPUS["a100-80gb"]
WORK = Work(responses=128, prompt=128, response=1024, longest=3072)
CONFIG = Config(model=ModelConfig(bf16=True), data=DataConfig(prompts_per_step=8))


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """Qwen2.5-7B's config.json."""
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("gpus", [2, 8, 16])
def test_all_that_is_proposed_fits(gpus: int, qwen: Path) -> None:
    shape = read_shape(qwen)
    if gpus == 2:  # 18 bytes a parameter on one of them
        with pytest.raises(ValueError, match=r"7\.6 G parameters .* fit no layout on 2 GPUs of 80 GiB"):
            propose(shape, CONFIG, A100, gpus=gpus, work=WORK)
        return
    found = propose(shape, CONFIG, A100, gpus=gpus, work=WORK)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    for one in found:
        assert check_layout(shape, one.config.parallel, world_size=one.trainer_gpus) == one.dp_size
        spec = choose_planned_spec(one.config)
        require_fits(shape, one.config, world_size=one.trainer_gpus, spec=spec, gpu_bytes=A100.memory)
        assert one.trainer_gpus + one.sidecar_gpus == gpus


def test_it_is_worth_asking(qwen: Path) -> None:
    """More GPUs are no slower, and a step ends with its longest response, which more GPUs a server write sooner."""
    shape = read_shape(qwen)
    seconds = [propose(shape, CONFIG, A100, gpus=gpus, work=WORK)[0].seconds for gpus in (8, 16, 32)]
    assert seconds == sorted(seconds, reverse=True)
    best = propose(shape, CONFIG, A100, gpus=8, work=WORK)[0]
    assert best.config.rollout.sidecar_tensor_parallel_size > 1


def test_a_step_that_generates_while_it_trains(qwen: Path) -> None:
    """Takes the longer of the two, and another split of the GPUs may be the quickest."""
    shape, ahead = read_shape(qwen), replace(CONFIG, rollout=replace(CONFIG.rollout, rollout_lead=1))
    in_turn, best = (propose(shape, config, A100, gpus=8, work=WORK)[0] for config in (CONFIG, ahead))
    assert best.seconds == max(best.train.total, best.generate) + best.push
    assert in_turn.seconds == in_turn.train.total + in_turn.generate + in_turn.push
    assert best.seconds < in_turn.seconds


@pytest.mark.parametrize("gpus", [1, 12])
def test_gpus_that_are_no_nodes(gpus: int, qwen: Path) -> None:
    with pytest.raises(ValueError, match=f"{gpus} GPUs are neither 2 to 8 of one node nor whole nodes of 8"):
        propose(read_shape(qwen), CONFIG, A100, gpus=gpus, work=WORK)


def test_the_lines_are_a_recipe(qwen: Path, tmp_path: Path) -> None:
    best = propose(read_shape(qwen), CONFIG, A100, gpus=16, work=WORK)[0].config
    lines = changed_settings(Config(), replace(best, rollout=replace(best.rollout, sidecar_python=Path("/py"))))
    (tmp_path / "recipe.toml").write_text(lines)
    loaded = load_recipe(tmp_path / "recipe.toml")
    assert loaded.parallel == best.parallel and loaded.train == best.train and loaded.model == best.model


def test_the_tool_needs_no_torch(qwen: Path) -> None:
    tool = ROOT / "tools/plan_parallelism.py"
    words = ["--model", str(qwen), "--gpus", "8", "--config", "examples/rlsc_7b.toml", "--rows", "3"]
    command = [sys.executable, "-X", "importtime", str(tool), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Predicted, not measured" in done.stdout and "[parallel]\n" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "megatron_rlsc.timing" in imported and not imported & {"torch", "megatron", "numpy", "transformers"}
    few = subprocess.run(
        [sys.executable, tool, "--model", qwen, "--gpus", "12"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert few.returncode == 2 and few.stderr.startswith("plan_parallelism: error: 12 GPUs are neither")
