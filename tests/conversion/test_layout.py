"""The table and the layouts, against a real Qwen2's names and shapes and against hand-laid rows.

Not covered: that megatron-core reads the rows so. tests/policy compares its log-probabilities with HF's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_rlsc.conversion.layout import gather, shard
from megatron_rlsc.conversion.rules import rules_for
from megatron_rlsc.conversion.shape import ModelShape, read_shape

TOY = ModelShape(  # 4 heads on 2 KV heads of 1 dimension: rows can be written out
    vocab_size=3,
    padded_vocab_size=3,
    hidden_size=4,
    intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=1,
    max_position_embeddings=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)


def test_the_table_has_exactly_the_tensors_of_transformers(tiny):
    shape = read_shape(tiny.hf_dir)
    assert shape.hf_tensors() == {name: tuple(tensor.shape) for name, tensor in tiny.state.items()}


def test_the_order_is_embedding_layers_norm_head():
    rules = rules_for(num_layers=2, tied=False, spec="local")
    assert rules[0].megatron == "embedding.word_embeddings.weight"
    assert [".0." in rule.megatron for rule in rules[1:15]] == [True] * 7 + [False] * 7
    assert [rule.megatron for rule in rules[15:]] == ["decoder.final_layernorm.weight", "output_layer.weight"]


def test_the_specs_differ_in_the_fused_norms_alone():
    local = rules_for(num_layers=1, tied=True, spec="local")
    fused = rules_for(num_layers=1, tied=True, spec="transformer_engine")
    assert [rule.hf for rule in local] == [rule.hf for rule in fused]
    assert {(a.megatron, b.megatron) for a, b in zip(local, fused) if a.megatron != b.megatron} == {
        ("decoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"),
    }


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])  # 4 and 8 are more than the 2 KV heads
@pytest.mark.parametrize("vocab_multiple", [1, 16, 128])  # 50 words: 1 x TP 4 gives 52 rows, 128 x 8 leaves ranks empty
def test_round_trip_is_bitwise(tiny, tp_size, vocab_multiple):
    shape = read_shape(tiny.hf_dir).padded_to(vocab_multiple * tp_size)
    for rule in rules_for(num_layers=2, tied=shape.tie_word_embeddings, spec="local"):
        tensors = [tiny.state[name] for name in rule.hf]
        shards = [shard(rule.layout, tensors, shape, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]
        assert len({part.shape for part in shards}) == 1, rule.megatron
        returned = gather(rule.layout, shards, shape)
        assert len(returned) == len(tensors)
        assert all(torch.equal(a, b) for a, b in zip(tensors, returned)), rule.megatron


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_trip_keeps_every_bit_of_half_floats(dtype):
    """NaNs and signed zeros too, which `torch.equal` on floats would not tell apart."""
    every = torch.arange(2**16).to(torch.int16).view(dtype).view(2**14, 4)
    shape = replace(TOY, intermediate_size=2**13)
    shards = [shard("gate_up", every.chunk(2), shape, tp_rank=rank, tp_size=2) for rank in range(2)]
    assert torch.equal(torch.cat(gather("gate_up", shards, shape)).view(torch.int16), every.view(torch.int16))


def test_qkv_rows_lie_group_by_group():
    """Heads 0, 1 share KV head 0 and heads 2, 3 share KV head 1: q0 q1 k0 v0 | q2 q3 k1 v1."""
    q, k, v = torch.tensor([0.0, 1, 2, 3]), torch.tensor([10.0, 11]), torch.tensor([20.0, 21])
    rows = [shard("qkv", (q, k, v), TOY, tp_rank=rank, tp_size=4).tolist() for rank in range(4)]
    assert rows == [[0, 1], [10, 20], [2, 3], [11, 21]]  # fewer groups than ranks: contiguous parts of a group
    assert shard("qkv", (q, k, v), TOY, tp_rank=1, tp_size=2).tolist() == [2, 3, 11, 21]


def test_gate_and_up_are_sharded_first_and_fused_after():
    gate, up = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    assert shard("gate_up", (gate, up), TOY, tp_rank=0, tp_size=2).flatten().tolist() == [0, 1, 10, 11]
    assert shard("gate_up", (gate, up), TOY, tp_rank=1, tp_size=2).flatten().tolist() == [2, 3, 12, 13]


def test_rows_behind_the_vocabulary_are_zero_and_cut():
    """3 words padded to 4 rows; whatever training leaves in row 3 does not come out."""
    words, shape = torch.ones(3, 4), TOY.padded_to(4)
    shards = [shard("vocab", (words,), shape, tp_rank=rank, tp_size=2) for rank in range(2)]
    assert shards[1].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    shards[1][1] = 7.0
    (returned,) = gather("vocab", shards, shape)
    assert torch.equal(returned, words)


def test_a_layout_that_does_not_divide_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match=r"TP 3 does not divide dimension 1 of a \(4, 4\) tensor"):
        shard("columns", (torch.ones(4, 4),), TOY, tp_rank=0, tp_size=3)
    with pytest.raises(ValueError, match="TP 2 does not divide the padded vocabulary of 3 rows"):
        shard("vocab", (torch.ones(3, 4),), TOY, tp_rank=0, tp_size=2)
