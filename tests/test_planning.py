"""Which layouts fit which model and its GPUs, and that a refusal says all that is wrong and what would fit.

Not covered: that a layout which passes also trains (tests/policy), that the local spec's memory is what is counted
(tests/policy/test_planned_memory.py), and that Transformer Engine's is: that takes a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlsc.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlsc.conversion.shape import SIZES, ModelShape
from megatron_rlsc.memory import GIB, StageMemory, plan_memory, runs_in_flight
from megatron_rlsc.planning import (
    VLLM_ALLOWANCE,
    check_layout,
    check_token_budget,
    fitting_layouts,
    plan_sidecar,
    require_fits,
)
from megatron_rlsc.recipe import load_recipe, parse_config

ROOT = Path(__file__).parent.parent

QWEN25_7B = ModelShape(
    vocab_size=152064,
    padded_vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
)


def check(tp: int, pp: int, world_size: int, *, cp: int = 1, vpp: int = 1) -> int:
    layout = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
    )
    return check_layout(QWEN25_7B, layout, world_size=world_size)


@pytest.mark.parametrize(
    ("tp", "pp", "world_size", "dp"),
    [(1, 1, 1, 1), (4, 1, 8, 2), (2, 2, 16, 4), (4, 7, 28, 1), (1, 28, 28, 1), (1, 1, 64, 64)],
)
def test_the_data_parallel_size_is_what_is_left_of_the_world(tp: int, pp: int, world_size: int, dp: int) -> None:
    assert check(tp, pp, world_size) == dp


@pytest.mark.parametrize("tp", [3, 7, 8, 14, 28, 56])
def test_tp_that_does_not_fit_is_refused_and_those_that_do_are_named(tp: int) -> None:
    """28 heads: 8 and 3 do not divide them; 7 and 14 do, but not 4 KV heads, nor the other way round."""
    with pytest.raises(ValueError) as error:
        check(tp, 1, tp)
    message = str(error.value)
    assert f"--tensor-model-parallel-size {tp} does not fit 28 attention heads, 4 KV heads" in message
    assert "18944: 1, 2, 4 do" in message


@pytest.mark.parametrize("pp", [3, 8, 56])
def test_pp_that_does_not_divide_the_layers_is_refused_and_those_that_do_are_named(pp: int) -> None:
    with pytest.raises(ValueError, match=f"--pipeline-model-parallel-size {pp} does not divide 28 layers: ") as error:
        check(1, pp, pp)
    assert "1, 2, 4, 7, 14, 28 do" in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 6, 7])
def test_a_world_that_is_no_multiple_of_tp_x_pp_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"TP 2 x PP 2 = 4 ranks do not divide the world of {world_size}: ") as error:
        check(2, 2, world_size)
    assert "a multiple of 4" in str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as error:
        check(8, 3, 8)
    message = str(error.value)
    for part in ("--tensor-model-parallel-size 8", "--pipeline-model-parallel-size 3", "TP 8 x PP 3 = 24 ranks"):
        assert part in message


def test_context_parallel_ranks_are_taken_from_the_replicas() -> None:
    assert check(4, 1, 16, cp=2) == 2
    with pytest.raises(ValueError, match="TP 4 x PP 1 x CP 3 = 12 ranks do not divide the world of 16"):
        check(4, 1, 16, cp=3)


def test_interleaved_runs_of_layers_must_come_out_even() -> None:
    assert check(1, 2, 2, vpp=7) == 1
    with pytest.raises(ValueError) as error:
        check(1, 2, 2, vpp=4)
    assert "size 2 x --virtual-pipeline-model-parallel-size 4 = 8 does not divide 28 layers: 1, 2, 4, 7" in str(
        error.value
    )


def test_no_more_layers_are_recomputed_than_a_stage_has() -> None:
    layout = ParallelConfig(
        pipeline_model_parallel_size=4,
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=8,
    )
    with pytest.raises(ValueError, match=r"--recompute-num-layers 8 is more than the 7 layers of a stage \(28 layers"):
        check_layout(QWEN25_7B, layout, world_size=4)


def test_the_longest_sample_must_fit_a_micro_batch() -> None:
    """1000 + 3072 = 4072 tokens; at TP 4 with SP and CP 2 packs are multiples of lcm(2 x 2, 2 x 4) = 8: 4072 = 8 x 509
    fits, and 4073 is padded to 4076, which a pack pads to 4080."""
    layout = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True, context_parallel_size=2)
    check_token_budget(4072, layout, max_tokens=4072)
    with pytest.raises(ValueError, match=r"are 4073 tokens together, more than the 4079 of .*; 4080 are enough"):
        check_token_budget(4073, layout, max_tokens=4079)
    check_token_budget(4073, layout, max_tokens=4080)


def test_the_layouts_that_fit_in_words() -> None:
    """28 layers on 14 stages are 2 each: one or two runs."""
    tp, pp, dp = fitting_layouts(QWEN25_7B)
    assert (tp, dp) == ("TP 1, 2, 4", "any DP")
    assert pp == "PP 1, 2 (VPP 2, 7, 14), 4 (VPP 7), 7 (VPP 2, 4), 14 (VPP 2)"


QWEN25_72B = replace(
    QWEN25_7B,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
QWEN25_32B = replace(
    QWEN25_7B,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
)


def configured(*, bf16: bool = True, tokens: int = 4096, optimizer: OptimizerConfig | None = None, **layout) -> Config:
    return Config(
        model=ModelConfig(bf16=bf16),
        parallel=ParallelConfig(**layout),
        optimizer=optimizer or OptimizerConfig(),
        train=TrainConfig(max_tokens_per_micro_batch=tokens),
    )


def te_stages(shape: ModelShape, config: Config, *, dp_size: int = 1) -> tuple[StageMemory, ...]:
    return plan_memory(shape, config, dp_size=dp_size, spec="transformer_engine")


def test_what_stays_of_7b() -> None:
    """TP 4: a quarter of 7,615,616,512, and three quarters more of what every rank has whole: 57 norms of 3584. The
    vocabulary, 297 x 512, is a multiple of 128 x 4."""
    (stage,) = te_stages(QWEN25_7B, configured(tensor_model_parallel_size=4, sequence_parallel=True))
    parameters = (7_615_616_512 + 3 * 57 * 3584) // 4
    assert stage.parameters == parameters
    assert (stage.weights, stage.gradients, stage.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)


def test_what_a_transformer_engine_layer_keeps_of_7b() -> None:
    """4096 tokens at TP 4 with SP, bfloat16. Norms: input and output, 4096 x 3584 / 4 are 7,340,032 bytes each, twice.
    Attention: q and its output, 4096 x 896 x 2 = 7,340,032 each; k and v, 4096 x 128 x 2 = 1,048,576 each; log sums of
    7 heads, 4096 x 7 x 4 = 114,688. MLP: gate, up and their product, 4096 x 4736 x 2 = 38,797,312 each."""
    norms = 4 * 7_340_032
    attention = 2 * 7_340_032 + 2 * 1_048_576 + 114_688
    mlp = 3 * 38_797_312
    (stage,) = te_stages(QWEN25_7B, configured(tensor_model_parallel_size=4, sequence_parallel=True))
    assert stage.activations == 28 * (norms + attention + mlp)
    recomputed = configured(
        tensor_model_parallel_size=4,
        sequence_parallel=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=4,
    )
    (again,) = te_stages(QWEN25_7B, recomputed)
    assert again.activations == 7 * 7_340_032, "the inputs of every fourth layer"
    assert again.backward - stage.backward == 4 * (norms + attention + mlp), "four layers at one time"


def test_the_head_of_7b() -> None:
    """A quarter of the vocabulary is 38016 rows. Of 1024 tokens: logits in float32; of 16384 rows at a time these, and
    the weight's gradient, in bfloat16; the hidden states' gradient as it is summed in float32, and once in bfloat16. Of
    4096 tokens: the last norm's input and output, a quarter each; gathered, those of them that are responses, and the
    gradient of these, whole."""
    (stage,) = te_stages(QWEN25_7B, configured(tensor_model_parallel_size=4, sequence_parallel=True))
    rows = 4096 * 3584 * 2
    chunk = 4 * 1024 * 38016 + 2 * 1024 * 16384 + 2 * 16384 * 3584 + (4 + 2) * 1024 * 3584
    assert stage.logprobs == 2 * (rows // 4) + 3 * rows + chunk


def test_a_distributed_optimizer_shares_its_state_out_and_gathers_it_for_a_save() -> None:
    """Two replicas: half of 12 bytes; the save has the whole and a half of it in float32. Moments in half the bits save
    two bytes each, and come back as float32 copies while they are stepped."""
    config = configured(tensor_model_parallel_size=4, use_distributed_optimizer=True)
    (stage,) = te_stages(QWEN25_7B, config, dp_size=2)
    assert stage.optimizer == pytest.approx(6 * stage.parameters, rel=1e-6)
    assert stage.save == pytest.approx(6 * stage.parameters, rel=1e-6)
    assert stage.update == 0
    (overlapping,) = te_stages(
        QWEN25_7B, replace(config, parallel=replace(config.parallel, overlap_grad_reduce=True)), dp_size=2
    )
    assert overlapping.save < stage.save / 5
    bits = OptimizerConfig(use_precision_aware_optimizer=True, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16")
    (few,) = te_stages(QWEN25_7B, replace(config, optimizer=bits), dp_size=2)
    assert few.optimizer == pytest.approx(4 * stage.parameters, rel=1e-6)
    assert few.update == pytest.approx(4 * stage.parameters, rel=1e-6)


@pytest.mark.parametrize(
    ("pp", "vpp", "micro_batches", "expected"),
    [
        (1, 1, None, [1]),
        (4, 1, None, [4, 3, 2, 1]),
        (4, 1, 2, [2, 2, 2, 1]),
        (2, 2, None, [2 + 2 + 1, 2 + 1]),  # 2 (PP - 1 - stage) + (VPP - 1) PP runs ahead, and the one at its end
        (2, 2, 2, [4, 3]),  # 2 x 2 runs in all
    ],
)
def test_micro_batches_in_flight(pp: int, vpp: int, micro_batches: int | None, expected: list[int]) -> None:
    layout = ParallelConfig(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    found = [runs_in_flight(layout, stage=stage, micro_batches=micro_batches) for stage in range(pp)]
    assert found == expected


def fit(shape: ModelShape, config: Config, world_size: int, gib: float) -> tuple[StageMemory, ...]:
    return require_fits(shape, config, world_size=world_size, spec="transformer_engine", gpu_bytes=int(gib * GIB))


def test_what_fits_is_let_through() -> None:
    stages = fit(QWEN25_7B, configured(tensor_model_parallel_size=4, sequence_parallel=True), 4, 80)
    assert max(stage.total for stage in stages) < 80 * GIB


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    """72B at TP 8 x PP 4 without SP: the first stage has four micro-batches in flight, their norms whole."""
    config = configured(tensor_model_parallel_size=8, pipeline_model_parallel_size=4, tokens=8192)
    with pytest.raises(ValueError) as error:
        fit(QWEN25_72B, config, 32, 80)
    first, *options = str(error.value).splitlines()
    (worst,) = (stage for stage in te_stages(QWEN25_72B, config) if stage.stage == 0)
    assert f"a GPU of stage 0 needs {worst.total / GIB:.1f} GiB and has 80.0: weights 4.4, gradients 8.8" in first
    named = {option.split("less: ")[1].split(" (")[0]: option for option in options}
    assert "and fits" in named["--sequence-parallel"]
    assert "and fits" in named["--max-tokens-per-micro-batch 4096"]
    assert "and fits" in named["--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"]
    assert not any("distributed-optimizer" in option for option in options), "there is one replica"
    with_sp = replace(config, parallel=replace(config.parallel, sequence_parallel=True))
    saved = worst.total - max(stage.total for stage in te_stages(QWEN25_72B, with_sp))
    assert f"{saved / GIB:.1f} GiB less" in named["--sequence-parallel"]
    fit(QWEN25_72B, with_sp, 32, 80)


def test_settings_that_fit_only_together_are_named_so_and_more_gpus_last() -> None:
    """7B on GPUs of 40 GiB: no one setting is enough."""
    config = configured(tokens=8192)
    with pytest.raises(ValueError, match=r"none alone fits, .* on 4 GPUs does") as error:
        fit(QWEN25_7B, config, 4, 40)
    flags = str(error.value).splitlines()[-1].partition("fits, ")[2].partition(" on 4 GPUs")[0].split()
    assert "--tensor-model-parallel-size" in flags and flags.count("--tensor-model-parallel-size") == 1
    fit(QWEN25_7B, parse_config([*FLAGS, *flags]), 4, 40)
    with pytest.raises(ValueError, match="take more GPUs, or larger ones"):
        fit(QWEN25_7B, config, 4, 4)


FLAGS = ["--bf16", "--max-tokens-per-micro-batch", "8192"]


def test_the_sidecar_s_share() -> None:
    """7B in bfloat16 on one GPU: 2 x 7,615,616,512 bytes of weights. A sequence's keys and values are 2 x 4 x 128 x 28
    numbers a token; TP 8 has one KV head each."""
    memory = plan_sidecar(QWEN25_7B, RolloutConfig(), bf16=True, longest=4096, gpu_bytes=80 * GIB)
    assert memory.weights == 2 * 7_615_616_512
    assert memory.sequence == 4096 * 2 * 4 * 128 * 28 * 2
    assert memory.kv_cache == int(0.85 * 80 * GIB) - memory.weights - VLLM_ALLOWANCE
    shared = RolloutConfig(sidecar_tensor_parallel_size=8)
    assert plan_sidecar(QWEN25_72B, shared, bf16=True, longest=4096, gpu_bytes=80 * GIB).sequence == (
        4096 * 2 * 1 * 128 * 80 * 2
    )
    with pytest.raises(ValueError, match=r"vLLM has 68.0 GiB .* weights take 135.4, .* --sidecar-tensor-parallel-size"):
        plan_sidecar(QWEN25_72B, RolloutConfig(), bf16=True, longest=4096, gpu_bytes=80 * GIB)


def save_config(folder: Path, shape: ModelShape) -> Path:
    fields = {name: getattr(shape, name) for name in (*SIZES, "rms_norm_eps", "rope_theta", "tie_word_embeddings")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **fields}))
    return folder


def planner(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "tools/plan_memory.py", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("recipe", "shape", "gpus"), [("7b", QWEN25_7B, 4), ("32b", QWEN25_32B, 16), ("72b", QWEN25_72B, 32)]
)
def test_the_recipes_fit_80_gib(recipe: str, shape: ModelShape, gpus: int, tmp_path: Path) -> None:
    """On as many trainer GPUs as their scripts ask for."""
    load = save_config(tmp_path / "model", shape)
    done = planner("--config", f"examples/rlsc_{recipe}.toml", "--load", str(load), "--trainer-gpus", str(gpus))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    stages = load_recipe(ROOT / f"examples/rlsc_{recipe}.toml").parallel.pipeline_model_parallel_size
    assert [row[0] for row in rows] == [str(stage) for stage in range(stages)]
    assert all(20 < float(row[-1]) < 80 for row in rows)


def test_the_planner_says_no_with_exit_code_2_and_needs_no_torch(tmp_path: Path) -> None:
    load = save_config(tmp_path / "model", QWEN25_7B)
    model = ("--load", str(load), "--bf16", "--tensor-model-parallel-size", "4")
    done = planner(*model, "--trainer-gpus", "4", "--gpu-memory-gib", "40")
    assert done.returncode == 2
    assert "plan_memory: error: a GPU of stage 0 needs" in done.stderr and "--sequence-parallel" in done.stderr
    assert "weights" in done.stdout, "the table is there all the same"
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "megatron_rlsc.memory" in imported
    assert not imported & {"torch", "megatron", "numpy", "transformers"}
    for flags, message in (
        (("--trainer-gpus", "6"), "do not divide the world of 6"),
        ((), "--trainer-gpus needs a whole number"),
        (("--trainer-gpus", "4", "--gpu-memory-gib", "much"), "--gpu-memory-gib needs a number, not 'much'"),
        (("--trainer-gpus", "4", "--load", str(tmp_path / "none")), "there is no model at"),
    ):
        done = planner(*model, *flags)
        assert done.returncode == 2 and message in done.stderr, done.stderr
