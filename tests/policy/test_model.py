"""The settings of megatron-core that run, and are wrong in silence, when they are left to their defaults or to a user.

Not covered: that the numbers would be wrong without them; test_layouts.py compares numbers.
"""

from __future__ import annotations

import pytest
import torch
from layouts import Layout, build_policy
from truth import truth
from world import World

from megatron_rlsc.conversion.shape import ModelShape

SETTINGS = {
    # finalize_model_grads.py divides by responses, not by micro-batches
    "calculate_per_token_loss": True,
    # layers.py marks parameters as sharded where it initialises them: the gradient norm under TP counts on it
    "perform_initialization": True,
    # gloo reads an output after it was sent
    "deallocate_pipeline_outputs": False,
    # a short pack is not received into a longer one's buffer
    "variable_seq_lengths": True,
    # rounds gradients to bfloat16
    "cross_entropy_loss_fusion": False,
    # CUDA extensions
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}


def settings_of(layout: Layout, shape: ModelShape, bf16: bool) -> dict[str, object]:
    policy = build_policy(layout, shape, None, bf16=bf16)
    config = policy.chunks[0].config
    found = {name: getattr(config, name) for name in [*SETTINGS, "batch_p2p_comm", "overlap_p2p_comm"]}
    found["pipeline_dtype"] = config.pipeline_dtype
    found["grad_reduce_in_fp32"] = policy.ddp[0].ddp_config.grad_reduce_in_fp32
    found["main_grad"] = {p.main_grad.dtype for chunk in policy.chunks for p in chunk.parameters()}
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sequence_parallel=True), Layout(pp=2, vpp=2)], ids=str)
def test_what_must_be_set(layout: Layout, bf16: bool, world: World) -> None:
    for found in world.run(layout.ranks, settings_of, layout, truth(False).shape, bf16):
        assert {name: found[name] for name in SETTINGS} == SETTINGS
        # p2p_communication.py: at PP 2 both neighbours are one peer, and batched messages meet the wrong receiver
        assert found["batch_p2p_comm"] == (layout.vpp == 1)
        assert found["overlap_p2p_comm"] == (layout.vpp > 1)
        assert found["pipeline_dtype"] == (torch.bfloat16 if bf16 else torch.float32)
        assert found["grad_reduce_in_fp32"] is True and found["main_grad"] == {torch.float32}
