"""Every dense Qwen2.5 as published: its config.json read, its model built on the meta device, its parameters counted.

The configs are public quotations of the published files. None was found, and the nearest kin's value stands, for
`rms_norm_eps` of Math-72B-Instruct and Coder-14B-Instruct, and for `sliding_window` and `max_window_layers` of Math, of
Coder but 32B-Instruct, and of 1.5B, 14B, 72B and 3B-Instruct; no dense Qwen2.5 uses a window.

Not covered: weights, and what a model computes (test_layouts.py).
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from world import World

from megatron_rlsc.config import ModelConfig, ParallelConfig
from megatron_rlsc.conversion.rules import rules_for
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.planning import check_layout

SIZES = """
                       0.5B    1.5B      3B      7B     14B     32B     72B
hidden_size             896    1536    2048    3584    5120    5120    8192
num_hidden_layers        24      28      36      28      48      64      80
num_attention_heads      14      12      16      28      40      40      64
num_key_value_heads       2       2       2       4       8       8       8
intermediate_size      4864    8960   11008   18944   13824   27648   29568
vocab_size           151936  151936  151936  152064  152064  152064  152064
tie_word_embeddings    true    true    true   false   false   false   false
"""

MODELS = """
                     rope_theta  rms_norm_eps  max_position_embeddings  sliding_window  max_window_layers
0.5B                  1000000.0         1e-06                    32768           32768                 24
1.5B                  1000000.0         1e-06                   131072          131072                 28
3B                    1000000.0         1e-06                    32768           32768                 36
7B                    1000000.0         1e-06                   131072          131072                 28
14B                   1000000.0         1e-05                   131072          131072                 48
32B                   1000000.0         1e-05                   131072          131072                 64
72B                   1000000.0         1e-05                   131072          131072                 80
0.5B-Instruct         1000000.0         1e-06                    32768           32768                 21
1.5B-Instruct         1000000.0         1e-06                    32768           32768                 21
3B-Instruct           1000000.0         1e-06                    32768           32768                 70
7B-Instruct           1000000.0         1e-06                    32768          131072                 28
14B-Instruct          1000000.0         1e-06                    32768          131072                 70
32B-Instruct          1000000.0         1e-06                    32768          131072                 70
72B-Instruct          1000000.0         1e-06                    32768          131072                 70
Math-1.5B                 10000         1e-06                     4096            4096                 21
Math-7B                   10000         1e-06                     4096            4096                 28
Math-72B                  10000         1e-05                     4096            4096                 80
Math-1.5B-Instruct        10000         1e-06                     4096            4096                 21
Math-7B-Instruct          10000         1e-06                     4096            4096                 28
Math-72B-Instruct         10000         1e-06                     4096            4096                 70
Coder-0.5B            1000000.0         1e-06                    32768           32768                 24
Coder-1.5B            1000000.0         1e-06                    32768          131072                 28
Coder-3B              1000000.0         1e-06                    32768          131072                 36
Coder-7B              1000000.0         1e-06                    32768          131072                 28
Coder-14B             1000000.0         1e-05                    32768          131072                 48
Coder-32B             1000000.0         1e-05                    32768          131072                 64
Coder-0.5B-Instruct   1000000.0         1e-06                    32768           32768                 24
Coder-1.5B-Instruct   1000000.0         1e-06                    32768           32768                 28
Coder-3B-Instruct     1000000.0         1e-06                    32768           32768                 36
Coder-7B-Instruct     1000000.0         1e-06                    32768          131072                 28
Coder-14B-Instruct    1000000.0         1e-06                    32768          131072                 70
Coder-32B-Instruct    1000000.0         1e-06                    32768          131072                 70
"""

ALIKE = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

PARAMETERS = {  # as the hub counts each repository's safetensors
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}

TP_SIZES = {  # that share out heads, KV heads (or each of them to several ranks) and MLP rows
    "0.5B": [1, 2],  # 14 heads: 7 goes not into 2 KV heads, nor they into 7; 14 goes not into 4864 = 2^8 x 19
    "1.5B": [1, 2, 4],  # 12 heads; 3, 6 and 12 go not into 8960 = 2^8 x 5 x 7
    "3B": [1, 2, 4, 8, 16],  # 16 heads, 11008 = 2^8 x 43
    "7B": [1, 2, 4],  # 28 heads: 7, 14 and 28 go not into 18944 = 2^9 x 37
    "14B": [1, 2, 4, 8],  # 40 heads: 5, 10 and 20 and 8 KV heads do not fit; 40 goes not into 13824 = 2^9 x 27
    "32B": [1, 2, 4, 8],  # as 14B; 40 goes not into 27648 = 2^10 x 27
    "72B": [1, 2, 4, 8, 16, 32, 64],  # 64 heads, 29568 = 2^7 x 231
}


def rows(table: str) -> dict[str, dict[str, Any]]:
    header, *lines = table.strip("\n").split("\n")
    cells = {name: map(json.loads, values) for name, *values in map(str.split, lines)}
    return {name: dict(zip(header.split(), values, strict=True)) for name, values in cells.items()}


def size_of(name: str) -> str:
    """`7B` of `Math-7B-Instruct`."""
    return next(part for part in name.split("-") if part in PARAMETERS)


CONFIGS = {
    name: {**ALIKE, **{field: sizes[size_of(name)] for field, sizes in rows(SIZES).items()}, **fields}
    for name, fields in rows(MODELS).items()
}


@functools.cache
def hf_tensors(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' own model, in its order; a tied lm_head is the embedding's second name."""
    config = Qwen2Config(**CONFIGS[size])
    with torch.device("meta"):
        tensors = Qwen2ForCausalLM(config).state_dict()
    return {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }


def build_on_meta(shapes: dict[str, ModelShape]) -> dict[str, dict[str, tuple[int, ...]]]:
    """{model: {parameter of Megatron's model: shape}} at TP 1 and PP 1, as the trainer builds it."""
    from megatron_rlsc.policy.model import build_model
    from megatron_rlsc.policy.parallel import init_parallel

    layout, meta = ParallelConfig(), torch.device("meta")
    parallel = replace(init_parallel(layout, seed=1), device=meta)
    found = {}
    for name, shape in shapes.items():
        with meta:
            (model,) = build_model(
                shape, model=ModelConfig(), spec="local", layout=layout, parallel=parallel, temperature=1.0
            )
        assert all(parameter.is_meta for parameter in model.parameters())
        found[name] = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return found


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelShape]:
    """Their vocabularies padded as for TP 8."""

    def read(name: str) -> ModelShape:
        folder: Path = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
        return read_shape(folder).padded_to(128 * 8)

    return {name: read(name) for name in CONFIGS}


@pytest.fixture(scope="module")
def built(shapes: dict[str, ModelShape], world: World) -> dict[str, dict[str, tuple[int, ...]]]:
    return world.run(1, build_on_meta, shapes)[0]


def test_all_of_them() -> None:
    """Seven sizes, base and Instruct; Math in three, Coder in six."""
    assert len(CONFIGS) == 2 * (7 + 3 + 6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_is_read_to_the_last_field(name: str, shapes: dict[str, ModelShape]) -> None:
    shape, config = shapes[name], CONFIGS[name]
    for field in shape.__dataclass_fields__.keys() & config.keys():
        assert getattr(shape, field) == config[field], field
    assert shape.head_dim == (64 if size_of(name) == "0.5B" else 128)
    assert shape.yarn is None
    assert shape.padded_vocab_size == 149 * 1024  # 151936 and 152064 lie between 148 x 1024 = 151552 and this


@pytest.mark.parametrize("size", PARAMETERS)
def test_transformers_has_as_many_parameters_as_were_published(size: str) -> None:
    """And the closed form: embeddings; q, k and v with biases, o, gate, up, down and two norms a layer; a last norm."""
    total = sum(torch.Size(shape).numel() for shape in hf_tensors(size).values())
    config = CONFIGS[size]
    h, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * h
    assert total == embeddings + layers * (h * h + h + 2 * (kv * h + kv) + h * h + 3 * h * f + 2 * h) + h
    assert total == PARAMETERS[size]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_names_transformers_tensors_and_no_other(name: str, shapes: dict[str, ModelShape]) -> None:
    assert shapes[name].hf_tensors() == hf_tensors(size_of(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_s_model_has_every_parameter(name: str, shapes: dict[str, ModelShape], built) -> None:
    """Row by row of the table, and in all: rows of the padded vocabulary left out."""
    shape, found = shapes[name], built[name]
    rules = rules_for(num_layers=shape.num_hidden_layers, tied=shape.tie_word_embeddings, spec="local")
    assert found.keys() == {rule.megatron for rule in rules}
    padding = (shape.padded_vocab_size - shape.vocab_size) * shape.hidden_size
    total = 0
    for rule in rules:
        numel = torch.Size(found[rule.megatron]).numel() - (padding if rule.layout == "vocab" else 0)
        assert numel == sum(torch.Size(size).numel() for size in shape.hf_shapes(rule)), rule.megatron
        total += numel
    assert total == PARAMETERS[size_of(name)]


@pytest.mark.parametrize("name", CONFIGS)
def test_tp_sizes(name: str, shapes: dict[str, ModelShape]) -> None:
    def fits(tp: int) -> bool:
        try:
            check_layout(shapes[name], ParallelConfig(tensor_model_parallel_size=tp), world_size=tp)
        except ValueError:
            return False
        return True

    assert [tp for tp in range(1, 129) if fits(tp)] == TP_SIZES[size_of(name)]
