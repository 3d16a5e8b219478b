"""Recipes and flags: what is written is what is used, and what is wrong is refused by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from megatron_rlsc.config import (
    KEPT_BY_RESUME,
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlsc.recipe import dump_recipe, load_recipe, parse_config

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").rglob("*.toml"))


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns its path."""

    def write(text: str) -> Path:
        (tmp_path / "recipe.toml").write_text(text)
        return tmp_path / "recipe.toml"

    return write


def test_there_are_examples():
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_parses(path):
    load_recipe(path)


def test_an_empty_recipe_is_the_defaults(recipe):
    assert load_recipe(recipe("")) == Config() == parse_config([])


def test_dump_and_load_are_inverse(recipe):
    config = Config(
        model=ModelConfig(load=Path("some where/else"), bf16=True),
        rollout=RolloutConfig(
            rollout_urls=("http://127.0.0.1:1", "http://node:2"), max_logprob_difference=0.5, temperature=0.7
        ),
        objective=ObjectiveConfig(alpha=0.0, weight_scale="batch-max"),
        optimizer=OptimizerConfig(lr=1e-6, adam_eps=1e-15),
    )
    assert load_recipe(recipe(dump_recipe(config))) == config
    assert load_recipe(recipe(dump_recipe(Config()))) == Config()  # unset fields stay unset


def test_whole_numbers_are_rates_too(recipe):
    assert load_recipe(recipe("[objective]\nalpha = 0")).objective.alpha == 0.0


def test_a_flag_overrides_the_recipe_wherever_it_stands(recipe):
    path = recipe(
        "[parallel]\ntensor_model_parallel_size = 2\npipeline_model_parallel_size = 2\n[objective]\nalpha = 3.0"
    )
    for argv in (
        ["--config", str(path), "--tensor-model-parallel-size", "4"],
        ["--tensor-model-parallel-size", "4", "--config", str(path)],
        ["--tensor-model-parallel-size=4", f"--config={path}"],
    ):
        config = parse_config(argv)
        assert config.parallel.tensor_model_parallel_size == 4
        assert config.parallel.pipeline_model_parallel_size == 2
        assert config.objective.alpha == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[objective]\nalpha_ = 0.1", r"recipe\.toml: unknown alpha_"),
        ("[objectives]\nalpha = 0.1", r"recipe\.toml: unknown objectives"),
        ("alpha = 0.1", r"recipe\.toml: unknown alpha"),
        ('[objective]\nalpha = "0.1"', r"recipe\.toml: .*objective\.alpha"),
        ("[parallel]\ntensor_model_parallel_size = 2.0", r"parallel\.tensor_model_parallel_size"),
        ('[objective]\nweight_scale = "mean"', r"objective\.weight_scale"),
        ("[objective", r"recipe\.toml is not TOML"),
        ("[rollout]\ntop_p = 0.9", r"top_p=0\.9 is refused"),
        ("[rollout]\nrollout_lead = 2", "rollout_lead must be 0 or 1, not 2"),
        ("[rollout]\nrollout_lead = -1", "rollout_lead must be 0 or 1, not -1"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(recipe, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(recipe(text))


def test_no_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe at .*absent\.toml"):
        parse_config(["--config", str(tmp_path / "absent.toml")])
    with pytest.raises(ValueError, match="--config needs the path"):
        parse_config(["--config"])


def test_several_names_in_a_flag_and_in_a_recipe(recipe):
    expected = ("alpha", "temperature")
    assert parse_config(["--resume", "--allow-changed", *expected]).train.allow_changed == expected
    path = recipe('[train]\nresume = true\nallow_changed = ["alpha", "temperature"]')
    assert load_recipe(path).train.allow_changed == expected
    assert load_recipe(recipe(dump_recipe(load_recipe(path)))).train.allow_changed == expected


def test_servers_with_spaces_or_commas_between(recipe):
    expected = ("http://a:1", "http://b:2", "https://[::1]:3")
    for words in ([",".join(expected)], list(expected), ["http://a:1/,http://b:2", expected[2]]):
        assert parse_config(["--rollout-urls", *words]).rollout.rollout_urls == expected
    path = recipe(f'[rollout]\nrollout_urls = ["{expected[0]}", "{expected[1]},{expected[2]}"]')
    assert load_recipe(path).rollout.rollout_urls == expected


def test_gpus_of_the_sidecars():
    flags = ["--sidecar-replicas", "2", "--sidecar-tensor-parallel-size", "2", "--sidecar-devices", "4", "5", "6", "7"]
    assert parse_config(flags).rollout.sidecar_devices == (4, 5, 6, 7)


def test_what_a_resumed_run_keeps_are_settings():
    for section, names in KEPT_BY_RESUME.items():
        assert set(names) <= {field.name for field in dataclasses.fields(getattr(Config(), section))}


def test_an_unknown_flag_ends_the_program(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_config(["--tensor-parallel", "2"])
    assert ended.value.code != 0
    assert "--tensor-parallel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (RolloutConfig, {"top_p": 0.95}, r"top_p=0\.95 is refused in training.*p_old.*Leave it at 1\.0"),
        (RolloutConfig, {"top_k": 50}, "top_k=50 is refused"),
        (RolloutConfig, {"repetition_penalty": 1.05}, r"repetition_penalty=1\.05 is refused"),
        (RolloutConfig, {"temperature": 0.0}, r"temperature must be positive and finite, not 0\.0"),
        (RolloutConfig, {"temperature": math.inf}, r"temperature must be positive and finite, not inf"),
        (RolloutConfig, {"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, not 0"),
        (RolloutConfig, {"max_response_length": 0}, "max_response_length"),
        (RolloutConfig, {"rollout_urls": ("node:1",)}, r"rollout_urls: 'node:1' is not of the form http://host:port"),
        (RolloutConfig, {"rollout_urls": ("http://node",)}, "'http://node' is not of the form"),
        (RolloutConfig, {"rollout_urls": ("http://key@node:1",)}, "is not of the form"),
        (RolloutConfig, {"rollout_urls": ("http://node:1/v1",)}, "is not of the form"),
        (RolloutConfig, {"rollout_urls": ("http://a:1,http://a:1/",)}, "names a server twice: http://a:1 http://a:1"),
        (RolloutConfig, {"rollout_urls": ("http://a:1",), "sidecar_replicas": 2}, "give up either"),
        (RolloutConfig, {"rollout_key_file": Path("key")}, "rollout_key_file is the key of rollout_urls: give both"),
        (RolloutConfig, {"sidecar_replicas": 0}, "sidecar_replicas must be at least 1, not 0"),
        (
            RolloutConfig,
            {"sidecar_replicas": 2, "sidecar_tensor_parallel_size": 2, "sidecar_devices": (0, 1)},
            "names 2 GPUs, sidecar_replicas 2 x sidecar_tensor_parallel_size 2 take 4",
        ),
        (RolloutConfig, {"sidecar_replicas": 2, "sidecar_devices": (1, 1)}, "different GPUs, from 0 on, not 1 1"),
        (RolloutConfig, {"sidecar_replicas": 2, "sidecar_port": 65535}, "no 2 ports from sidecar_port 65535 on"),
        (RolloutConfig, {"sidecar_restarts": -1}, "sidecar_restarts must not be negative"),
        (RolloutConfig, {"stall_timeout": 0.0}, r"stall_timeout must be positive, not 0\.0"),
        (ObjectiveConfig, {"alpha": -0.1}, r"alpha must not be negative, it is -0\.1"),
        (ObjectiveConfig, {"power": 0.0}, r"power must be positive, it is 0\.0"),
        (ObjectiveConfig, {"objective": "ttrl", "weight_scale": "batch-max"}, "those of ttrl do not: give up either"),
        (OptimizerConfig, {"lr": -1.0}, "lr must not be negative"),
        (OptimizerConfig, {"clip_grad": -1.0}, "clip_grad must not be negative"),
        (OptimizerConfig, {"exp_avg_dtype": "bf16"}, r"exp_avg_dtype=bf16 needs use_precision_aware_optimizer"),
        (OptimizerConfig, {"main_grads_dtype": "bf16"}, r"main_grads_dtype=bf16 needs use_precision_aware_optimizer"),
        (ParallelConfig, {"tensor_model_parallel_size": 0}, "tensor_model_parallel_size must be at least 1, not 0"),
        (
            ParallelConfig,
            {"pipeline_model_parallel_size": -2},
            "pipeline_model_parallel_size must be at least 1, not -2",
        ),
        (DataConfig, {"prompts_per_step": 0}, "prompts_per_step must be at least 1, not 0"),
        (DataConfig, {"prompt_template": "qwen"}, r"prompt_template 'qwen' .*\{problem\}"),
        (ModelConfig, {"make_vocab_size_divisible_by": 0}, "make_vocab_size_divisible_by"),
        (TrainConfig, {"train_iters": 0}, "train_iters must be at least 1, not 0"),
        (TrainConfig, {"save_interval": -1}, "save_interval"),
        (
            TrainConfig,
            {"profile": True, "train_iters": 1},
            "step-start 2 to .*-end 2 are no steps of 1 to .* 1: give",
        ),
        (
            TrainConfig,
            {"profile": True, "profile_step_start": 5},
            "step-start 5 to .*-end 2 are no steps of 1 to .* 20",
        ),
        (TrainConfig, {"profile": True, "profile_step_start": 0}, "--profile-step-start 0 to"),
        (TrainConfig, {"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        (TrainConfig, {"allow_changed": ("alpha",)}, "--allow-changed says what --resume may change: give both"),
        (
            TrainConfig,
            {"resume": True, "allow_changed": ("alpha", "lr", "tp")},
            "--allow-changed lr tp: a resumed run keeps load, data_path, .*alpha, power, weight_scale, seed; all else",
        ),
    ],
)
def test_refused_values(section, values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_a_precision_aware_optimizer_needs_shards_in_bfloat16():
    optimizer = OptimizerConfig(use_precision_aware_optimizer=True, exp_avg_dtype="bf16")
    bf16, sharded = ModelConfig(bf16=True), ParallelConfig(use_distributed_optimizer=True)
    for lacking in ({}, {"model": bf16}, {"parallel": sharded}):
        with pytest.raises(ValueError, match="use_precision_aware_optimizer needs bf16 and use_distributed_optimizer"):
            Config(optimizer=optimizer, **lacking)
    Config(optimizer=optimizer, model=bf16, parallel=sharded)


def test_padded_documents_are_not_shared_out():
    with pytest.raises(ValueError, match=r"padded does not go with context parallelism \(context_parallel_size 2\)"):
        Config(model=ModelConfig(sequence_layout="padded"), parallel=ParallelConfig(context_parallel_size=2))


def test_every_field_has_its_help(capsys):
    """A docstring under each field is its `--help`; the flag is the field's name with dashes."""
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    shown = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config(), section.name)):
            assert f"--{field.name.replace('_', '-')}" in shown
