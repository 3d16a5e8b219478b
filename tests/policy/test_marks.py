"""A profiled update on every kind of layout: its ranges, as many as there are micro-batches, and the same weights.

Not covered: Transformer Engine's attention, and GPUs.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from layouts import Layout, build_policy, hf_weights, pack_for, update
from torch import Tensor
from truth import truth
from world import World

from megatron_rlsc.breakdown import break_down
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.policy.marks import marked
from megatron_rlsc.policy.policy import Policy
from megatron_rlsc.ranges import span
from megatron_rlsc.types import Sample

FORWARD, BACKWARD = "forward-backward/forward-compute", "forward-backward/backward-compute"


def hooks(policy: Policy) -> list[int]:
    """Of each layer's attention; the wrapper that overlaps has some of its own."""
    cores = [layer.self_attention.core_attention for chunk in policy.chunks for layer in chunk.decoder.layers]
    return [len(core._forward_hooks) + len(core._forward_pre_hooks) for core in cores]


def updated(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], profiled: bool
) -> tuple[int, dict[str, int], bool, dict[str, Tensor]]:
    """This rank's micro-batches, how often each range was entered, whether the marks are gone, and the weights."""
    policy, calls = build_policy(layout, shape, state), {}
    before = hooks(policy)
    with ExitStack() as recording:
        if profiled:
            recording.enter_context(marked(policy.chunks, policy.optimizer))
            profiler = recording.enter_context(torch.profiler.profile())
            recording.enter_context(span("step"))
        update(policy, samples)
        weights = hf_weights(policy)
    if profiled:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            ranges = break_down(json.loads(path.read_text())["traceEvents"]).ranges
        calls = {name: part.calls for name, part in ranges.items()}
    gone = hooks(policy) == before
    gone &= policy.chunks[0].config.timers is None and policy.optimizer.config.timers is None
    return len(pack_for(policy, samples)), calls, gone, weights


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2, sequence_parallel=True),
        Layout(pp=2),
        Layout(pp=2, vpp=2),
        Layout(cp=2),
        Layout(dp=2, distributed_optimizer=True, overlap=True),
        Layout(recompute="uniform"),
    ],
    ids=str,
)
def test_ranges_of_an_update(layout: Layout, world: World) -> None:
    expected = truth(False)
    arguments = (layout, expected.shape, expected.state, expected.batches["seven"])
    plain, profiled = (world.run(layout.ranks, updated, *arguments, flag) for flag in (False, True))
    assert all(torch.equal(tensor, plain[0][3][name]) for name, tensor in profiled[0][3].items())
    layers = expected.shape.num_hidden_layers // layout.pp
    for rank, (batches, calls, gone, _) in enumerate(profiled):
        last = rank >= (layout.pp - 1) * layout.ranks // layout.pp
        assert gone and batches >= 2
        assert calls[FORWARD] == calls[BACKWARD] == batches * layout.vpp
        assert calls[f"{FORWARD}/attention"] == batches * layers
        assert calls.get(f"{BACKWARD}/attention", 0) == (batches * layers if layout.recompute else 0)
        assert calls.get(f"{FORWARD}/logprobs", 0) == calls.get(f"{BACKWARD}/logprobs-backward", 0) == batches * last
        assert calls["forward-backward/all-grads-sync"] == 1
        assert calls["gradient-norm"] == calls["optimizer"] == calls["optimizer/optimizer-inner-step"] == 1
        assert calls["gather-weights"] > 0
        assert any("-recv" in name for name in calls) == (layout.pp > 1)
        if not layout.overlap:  # where a gather may begin on either side of the pass
            assert (f"{FORWARD}/communication" in calls) == (layout.tp * layout.cp > 1)
