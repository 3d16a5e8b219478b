"""config.json: what it says is read, what is not supported is refused by name."""

from __future__ import annotations

import json

import pytest

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
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling .*yarn"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters .*yarn"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["sliding_attention"]}, "sliding-window"),
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
    with pytest.raises(ValueError, match=r"rope_scaling .*; quantization_config"):
        read_shape(write(tmp_path, rope_scaling={"type": "linear"}, quantization_config={}))


def test_no_folder_no_config_no_json(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        read_shape(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        read_shape(tmp_path)
    for text in ("{", "\x00", "[]", "null"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            read_shape(tmp_path)
