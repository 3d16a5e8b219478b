"""HF weights into a layout's shards and out again, bit for bit; NaN and infinity refused on every rank.

Not covered: reading and writing HF folders (tests/conversion), bfloat16, and Transformer Engine's names
(test_transformer_engine.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import Layout, build_policy, hf_weights, update
from torch import Tensor
from truth import truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.types import Sample


def there_and_back(layout: Layout, shape: ModelShape, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return hf_weights(build_policy(layout, shape, state))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2),
        Layout(tp=4),
        Layout(pp=2),
        Layout(pp=4),
        Layout(tp=2, pp=2),
        Layout(tp=2, dp=2),
        Layout(pp=2, dp=2),
        Layout(pp=2, vpp=2),
        Layout(tp=2, pp=2, vpp=2),
        Layout(pp=2, cp=2),
        Layout(dp=2, distributed_optimizer=True, overlap=True),
    ],
    ids=str,
)
def test_hf_to_megatron_to_hf_is_bitwise(layout: Layout, tied: bool, world: World) -> None:
    """On rank 0, in HF's order, padding rows (50.0) cut; the other ranks yield nothing."""
    expected = truth(tied)
    found, *others = world.run(layout.ranks, there_and_back, layout, expected.shape, expected.state)
    assert list(found) == list(expected.shape.hf_tensors())
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(expected.state[name]), name
    assert not any(others)


# NaN and infinity

PP2 = Layout(pp=2)
LAST = 3
"""Of the four layers: on the second stage."""


def refusal_of_weights(layout: Layout, shape: ModelShape, state: dict[str, Tensor]) -> str:
    try:
        build_policy(layout, shape, state)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("layout", [PP2, Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_hf_weights_that_are_not_finite_are_refused_on_every_rank(layout: Layout, world: World) -> None:
    """One value in a bias and one in a matrix of the last layer, which the first stage never reads."""
    expected = truth(False)
    names = [f"model.layers.{LAST}.{name}" for name in ("self_attn.k_proj.bias", "mlp.down_proj.weight")]
    state = {name: tensor.clone() for name, tensor in expected.state.items()}
    for name, value in zip(names, (float("nan"), float("-inf"))):
        state[name].view(-1)[-1] = value
    message = (
        f"2 of the {len(state)} tensors of the HF model hold NaN or infinity, and no training would mend them: "
        f"{names[0]}, {names[1]}. Copy or download the model again, or take an earlier checkpoint"
    )
    assert world.run(layout.ranks, refusal_of_weights, layout, expected.shape, state) == [message] * layout.ranks


def test_of_many_bad_tensors_the_first_are_named(world: World) -> None:
    expected = truth(True)
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in expected.state.items()}
    (message,) = world.run(1, refusal_of_weights, Layout(), expected.shape, state)
    tensors = len(expected.shape.hf_tensors())
    assert message.startswith(f"{tensors} of the {tensors} tensors")
    assert ": model.embed_tokens.weight, model.layers.0.input_layernorm.weight, " in message
    assert message.count("model.") == 5 and f" and {tensors - 5} more. Copy" in message


def test_large_weights_are_finite(world: World) -> None:
    """Their sum is not: 64 rows of 3e38 are 1.9e40, and float32 ends at 3.4e38."""
    expected = truth(False)
    state = expected.state | {"lm_head.weight": torch.full_like(expected.state["lm_head.weight"], 3e38)}
    assert world.run(1, refusal_of_weights, Layout(), expected.shape, state) == ["none"]


def save_with_nan(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], folder: Path
) -> None:
    """After an update: one value of the last layer's first bias is NaN."""
    policy = build_policy(layout, shape, state)
    update(policy, samples)
    names = dict(policy.chunks[-1].named_parameters())
    names[f"decoder.layers.{LAST}.self_attention.linear_qkv.bias"].data[0] = float("nan")
    policy.save(folder, 1)


def refusal_of_checkpoint(layout: Layout, shape: ModelShape, folder: Path, take: str) -> str:
    policy = build_policy(layout, shape, None)
    try:
        getattr(policy, take)(folder)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("take", ["load", "resume"])
@pytest.mark.parametrize("layout", [PP2, Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_a_checkpoint_that_is_not_finite_is_refused_on_every_rank(
    layout: Layout, take: str, world: World, tmp_path: Path
) -> None:
    expected = truth(False)
    arguments = (Layout(tp=2), expected.shape, expected.state, expected.batches["three"], tmp_path)
    world.run(2, save_with_nan, *arguments)
    for message in world.run(layout.ranks, refusal_of_checkpoint, layout, expected.shape, tmp_path, take):
        assert message.startswith("1 of the")
        assert f"tensors of {tmp_path / 'iter_0000001'} hold NaN or infinity" in message
        assert f": decoder.layers.{LAST}.self_attention.linear_qkv.bias. Copy" in message
