"""Which layouts fit which model, and that a refusal says all that is wrong and what would fit.

Not covered: that a layout which passes also trains (tests/policy), and memory.
"""

from __future__ import annotations

import pytest

from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.planning import check_layout, check_token_budget, fitting_layouts

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
