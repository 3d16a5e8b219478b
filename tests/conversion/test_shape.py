"""config.json: what it says is read, what is not supported is refused by name."""

from __future__ import annotations

import json

import pytest
from transformers import Qwen2Config

from megatron_rlsc.conversion.rope import Yarn
from megatron_rlsc.conversion.shape import read_shape

QWEN25_7B = {  # as published, less what has no meaning here
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def write(folder, **changes):
    config = {name: value for name, value in {**QWEN25_7B, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_published_config(tmp_path):
    shape = read_shape(write(tmp_path))
    assert (shape.head_dim, shape.query_size, shape.kv_size) == (128, 3584, 512)  # 3584 / 28, 28 x 128, 4 x 128
    assert (shape.rope_theta, shape.rms_norm_eps, shape.tie_word_embeddings) == (1e6, 1e-6, False)
    assert (shape.vocab_size, shape.padded_vocab_size) == (152064, 152064)
    assert shape.padded_to(128 * 8).padded_vocab_size == 152576  # 149 x 1024
    assert sum(1 for _ in shape.hf_tensors()) == 28 * 12 + 3


def test_rope_theta_where_transformers_5_writes_it(tmp_path):
    new = write(tmp_path, rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 500})
    assert read_shape(new).rope_theta == 500.0


def test_what_transformers_writes_is_read(tiny):
    assert read_shape(tiny.hf_dir).rope_theta == 5000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
        ({"architectures": ["Qwen2ForRewardModel"]}, "Qwen2ForRewardModel"),
        ({"use_mrope": True}, "use_mrope"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config .*delete it"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"vocab_size": ..., "rope_theta": ...}, "lacks vocab_size, rope_theta"),
        ({"num_hidden_layers": "28"}, "num_hidden_layers must be a positive int, not '28'"),
        ({"hidden_size": -1}, "hidden_size must be a positive int, not -1"),
        ({"vocab_size": True}, "vocab_size must be a positive int, not True"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive float, not 0"),
        ({"num_attention_heads": 24}, "num_attention_heads 24 x head_dim 149 is not hidden_size 3584"),
        ({"head_dim": 64}, "num_attention_heads 28 x head_dim 64 is not hidden_size 3584"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 28"),
    ],
)
def test_refusals(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_shape(write(tmp_path, **changes))


def test_every_unsupported_feature_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"quantization_config; rope_type 'linear'.*; sliding-window"):
        read_shape(write(tmp_path, rope_scaling={"type": "linear"}, quantization_config={}, **SLIDING))


# Sliding windows: transformers' Qwen2Config says which layers slide

SLIDING = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 70},  # as Qwen2.5-14B-Instruct counts
        {
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 0,
            "layer_types": ["full_attention"] * 28,
        },
        {"use_sliding_window": True, "sliding_window": 131072, "max_window_layers": 0},  # the whole context
    ],
)
def test_a_window_that_cuts_nothing_is_accepted(tmp_path, changes):
    layer_types = Qwen2Config(**{**QWEN25_7B, **changes}).layer_types
    assert "sliding_attention" not in layer_types or changes["sliding_window"] >= QWEN25_7B["max_position_embeddings"]
    assert read_shape(write(tmp_path, **changes)).num_hidden_layers == 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SLIDING, "4096 tokens on 7 of 28 layers: set use_sliding_window to false"),  # 21 .. 27
        ({**SLIDING, "max_window_layers": 0, "sliding_window": 131071}, "131071 tokens on 28 of 28 layers"),
        ({**SLIDING, "sliding_window": 131072}, "131072 tokens on 7 of 28 layers"),  # vLLM has no such mixture
        ({**SLIDING, "layer_types": ["sliding_attention"] + ["full_attention"] * 27}, "4096 tokens on 1 of 28 layers"),
        ({"layer_types": ["sliding_attention"] * 28}, "on 28 of 28 layers"),
        ({"layer_types": ["chunked_attention"] * 28}, "layer_types .*chunked_attention"),
        ({**SLIDING, "max_window_layers": "21"}, "max_window_layers '21'"),
        ({"use_sliding_window": "no"}, "use_sliding_window 'no'"),
    ],
)
def test_a_window_that_cuts_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_shape(write(tmp_path, **changes))


# Rotary positions

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}  # of Qwen2.5-Instruct's card


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "yarn", **YARN}},
        {"rope_scaling": {"rope_type": "yarn", **YARN}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}, "rope_theta": ...},
    ],
)
def test_yarn_wherever_it_stands(tmp_path, rope):
    """Its attention factor is 0.1 ln 4 + 1."""
    shape = read_shape(write(tmp_path, **rope))
    assert shape.rope_theta == 1e6
    assert shape.yarn == Yarn(
        factor=4.0,
        original_max_position_embeddings=32768,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=pytest.approx(1.1386294361),
        truncate=True,
    )


def test_plain_rotary_positions_are_no_yarn(tmp_path):
    assert read_shape(write(tmp_path)).yarn is None
    assert read_shape(write(tmp_path, rope_scaling={"type": "default"})).yarn is None


def test_yarn_with_all_its_settings(tmp_path):
    settings = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": False}
    yarn = read_shape(write(tmp_path, rope_scaling={"type": "yarn", **YARN, **settings})).yarn
    assert (yarn.beta_fast, yarn.beta_slow, yarn.attention_factor, yarn.truncate) == (16.0, 2.0, 1.5, False)


def test_what_transformers_writes_of_yarn_is_read(tmp_path):
    config = Qwen2Config(max_position_embeddings=131072, rope_scaling={"type": "yarn", **YARN}, rope_theta=1e6)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert (shape.rope_theta, shape.yarn.factor, shape.yarn.original_max_position_embeddings) == (1e6, 4.0, 32768)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "longrope", "proportional", "mrope", 7])
def test_other_scalings_are_refused_by_name(tmp_path, kind):
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(ValueError, match=rf"rope_type {kind!r} of {name} .*delete it for the plain rotary pos"):
            read_shape(write(tmp_path, **{name: {"rope_type": kind, "factor": 2.0}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor None .*original_max_position_embeddings None"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": "4"}}, "rope_scaling.factor '4'"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": True}}, "rope_scaling.factor True"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": 1.0}}, "rope_scaling.factor 1.0 .*by more than 1"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": 2.0}}, "max_position_embeddings 131072 above .* = 65536"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": None}}, "rope_scaling.beta_fast None"),
        ({"rope_scaling": {"type": "yarn", **YARN, "truncate": 1}}, "rope_scaling.truncate 1"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 1.0}},
            "rope_scaling.attn_factor with rope_type 'yarn'",
        ),
        ({"rope_scaling": {"type": "yarn", **YARN, "mscale": 1.0}}, "rope_scaling.mscale with rope_type 'yarn'"),
        ({"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section with rope_type 'default'"),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_theta": 1e4}}, "beside rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings outside rope_scaling"),
    ],
)
def test_rotary_settings_that_are_wrong_or_unknown(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_shape(write(tmp_path, **changes))


def test_no_folder_no_config_no_json(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_shape(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        read_shape(tmp_path)
    for text in ("{", "\x00", "[]", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_shape(tmp_path)
