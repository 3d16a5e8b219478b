"""HF weights into a layout's shards and out again, bit for bit.

Not covered: reading and writing HF folders (tests/conversion), bfloat16, and Transformer Engine's names.
"""

from __future__ import annotations

import pytest
import torch
from layouts import Layout, build_policy, hf_weights
from torch import Tensor
from truth import truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape


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
