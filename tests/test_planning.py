"""Which layouts fit which model, and that a refusal says all that is wrong and what would fit.

Not covered: that a layout which passes also trains (tests/policy), and memory.
"""

from __future__ import annotations

import pytest

from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.planning import check_layout

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


def check(tp: int, pp: int, world_size: int) -> int:
    layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
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
