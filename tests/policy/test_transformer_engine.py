"""The Transformer Engine spec without a GPU: its parameters' names, and checkpoints between it and the local spec.

The wheel's own Python over an extension without kernels (faked_te.py), in processes of its own.

Not covered: anything that is computed with it; that is tests/gpu. FP8, whose state checkpoints drop.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faked_te
import pytest
import torch
from reference import tiny_qwen
from test_checkpoint import hide_code_in_extra_state
from torch import Tensor
from truth import truth
from world import World

from megatron_rlsc.config import ParallelConfig
from megatron_rlsc.conversion.layout import shard
from megatron_rlsc.conversion.rules import EMBEDDING, OUTPUT, Layout, Rule, rules_for
from megatron_rlsc.conversion.shape import ModelShape

ROOT = Path(__file__).parents[2]
ONE, DISTRIBUTED = ParallelConfig(), ParallelConfig(use_distributed_optimizer=True)
TP2, PP2 = ParallelConfig(tensor_model_parallel_size=2), ParallelConfig(pipeline_model_parallel_size=2)
VPP2 = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
TP_DIM: dict[Layout, int | None] = {"replicated": None, "vocab": 0, "columns": 1, "qkv": 0, "gate_up": 0}
EXTRA_STATES = {
    f"decoder.{module}._extra_state"
    for module in (
        "layers.self_attention.linear_qkv",
        "layers.self_attention.linear_proj",
        "layers.mlp.linear_fc1",
        "layers.mlp.linear_fc2",
        "final_layernorm",
    )
}

tied_and_untied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    """`ranks(n, function, ...)`: te_model.function on n ranks that have Transformer Engine, and their answers."""
    if not faked_te.FOLDER.exists():
        pytest.fail(
            f"no Transformer Engine wheel in {faked_te.FOLDER}: `bash tools/setup_env.sh`, or "
            f"pip install --no-deps --target {faked_te.FOLDER} transformer-engine=={pinned()}"
        )
    world = World(2)
    yield lambda size, function, *args: world.run(size, faked_te.call, "te_model", function, *args)
    world.close()


def pinned() -> str:
    (requirement,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    return requirement.partition("==")[2]


@functools.cache
def bf16_state(tied: bool) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in truth(tied).state.items()}


@functools.cache
def gradients(tied: bool) -> list[dict[str, Tensor]]:
    """Two, of every HF tensor."""
    generator = torch.Generator().manual_seed(0)
    shapes = truth(tied).shape.hf_tensors()
    return [{name: torch.randn(size, generator=generator) for name, size in shapes.items()} for _ in range(2)]


def size(layout: ParallelConfig) -> int:
    return layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size


def test_it_is_the_pinned_version(ranks):
    version, theirs, ours = ranks(1, "versions")[0]
    assert version == pinned()
    # Parameter groups are loaded from checkpoints as they are, and either optimizer must find there what it reads.
    assert set(theirs) <= set(ours)


def test_attention_never_falls_back_in_silence(ranks):
    """cuDNN's kernel, and neither flash-attn nor whole matrices of scores. A local model says nothing, before or after:
    megatron-core does not build one that says otherwise than another in its process."""
    shape = truth(False).shape
    _, local_rope = ranks(1, "kernels", "local", shape)[0]
    assert ranks(1, "kernels", "transformer_engine", shape)[0] == (["0", "1", "0"], True)
    assert ranks(1, "kernels", "local", shape)[0] == (["0", "1", "0"], False) and not local_rope


def test_attention_over_shared_prompts_is_that_of_the_local_spec(ranks):
    """With what Transformer Engine's documentation promises in the kernels' place."""
    theirs, ours = ranks(1, "attend_with_shared_prompts", truth(False).shape)[0]
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def expected_parameters(shape: ModelShape, layout: ParallelConfig, tp_rank: int, pp_rank: int) -> dict[str, tuple]:
    """(shape, dimension of TP) by chunk and Megatron name, from the table."""
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    runs = pp * layout.virtual_pipeline_model_parallel_size
    shape = shape.padded_to(128 * tp)
    layers = shape.num_hidden_layers // runs
    found = {}

    def put(run: int, name: str, rule: Rule) -> None:
        if run % pp == pp_rank:  # runs are dealt to the stages in turn
            tensors = [torch.empty(sizes, device="meta") for sizes in shape.hf_shapes(rule)]
            part = shard(rule.layout, tensors, shape, tp_rank=tp_rank, tp_size=tp)
            found[f"{run // pp}.{name}"] = tuple(part.shape), TP_DIM[rule.layout]

    for rule in rules_for(
        num_layers=shape.num_hidden_layers, tied=shape.tie_word_embeddings, spec="transformer_engine"
    ):
        if rule.megatron.startswith("decoder.layers."):
            layer, _, rest = rule.megatron.removeprefix("decoder.layers.").partition(".")
            put(int(layer) // layers, f"decoder.layers.{int(layer) % layers}.{rest}", rule)
        else:
            put(0 if rule.hf == EMBEDDING.hf else runs - 1, rule.megatron, rule)
    if shape.tie_word_embeddings and runs > 1:
        put(runs - 1, OUTPUT.megatron, EMBEDDING)
    return found


@tied_and_untied
@pytest.mark.parametrize("layout", [ONE, TP2, PP2, VPP2], ids=["one", "tp2", "pp2", "vpp2"])
def test_parameters_are_the_table_s(layout: ParallelConfig, tied: bool, ranks: Any) -> None:
    """Names, shapes, and which dimension is shared out: clipping reads that, and a wrong one gives a wrong norm."""
    shape = truth(tied).shape
    for (tp_rank, pp_rank), found, dtypes in ranks(size(layout), "parameters", "transformer_engine", shape, layout):
        assert found == expected_parameters(shape, layout, tp_rank, pp_rank)
        assert dtypes == {torch.bfloat16}


@tied_and_untied
@pytest.mark.parametrize("layout", [TP2, VPP2], ids=["tp2", "vpp2"])
def test_hf_to_transformer_engine_to_hf_is_bitwise(layout: ParallelConfig, tied: bool, ranks: Any) -> None:
    state = bf16_state(tied)
    found = ranks(2, "there_and_back", truth(tied).shape, layout, state)[0]
    assert all(tensor.equal(state[name]) for name, tensor in found.items())
    assert list(found) == list(truth(tied).shape.hf_tensors())


@tied_and_untied
@pytest.mark.parametrize("layout", [ONE, VPP2], ids=["one", "vpp2"])
def test_checkpoint_entries_are_the_local_spec_s(layout: ParallelConfig, tied: bool, ranks: Any) -> None:
    """The same tensors under the same keys; of the objects, megatron-core's local modules lack the final norm's."""
    entries = {
        spec: ranks(size(layout), "entries", spec, truth(tied).shape, layout)
        for spec in ("local", "transformer_engine")
    }
    for (tensors, objects), (te_tensors, te_objects) in zip(
        entries["local"], entries["transformer_engine"], strict=True
    ):
        assert te_tensors == tensors
        assert objects == {key: count for key, count in te_objects.items() if "final_layernorm" not in key}
    assert set().union(*(objects for _, objects in entries["transformer_engine"])) == EXTRA_STATES


@tied_and_untied
@pytest.mark.parametrize("function", ["load_as_megatron_does", "load"])
@pytest.mark.parametrize(
    ("before", "after"), [("local", "transformer_engine"), ("transformer_engine", "local")], ids=["to-te", "to-local"]
)
def test_checkpoints_go_both_ways(
    before: str, after: str, function: str, tied: bool, ranks: Any, tmp_path: Path
) -> None:
    """Saved at TP 2, loaded at PP 2 x VPP 2, by megatron-core at its default strictness and by us."""
    shape, state = truth(tied).shape, bf16_state(tied)
    ranks(2, "save", before, shape, TP2, state, tmp_path)
    found = ranks(2, function, after, shape, VPP2, tmp_path / "release")[0]
    assert all(tensor.equal(state[name]) for name, tensor in found.items())


@tied_and_untied
@pytest.mark.parametrize("layout", [TP2, VPP2], ids=["tp2", "vpp2"])
def test_a_converted_model_is_loaded_by_megatron_into_transformer_engine(
    layout: ParallelConfig, tied: bool, ranks: Any, tmp_path: Path
) -> None:
    """What tools/convert_hf.py writes, at megatron-core's default strictness."""
    model = tiny_qwen(tied=tied)
    model.bfloat16().save_pretrained(tmp_path / "hf")
    ranks(1, "convert", tmp_path / "hf", tmp_path / "megatron")
    path = tmp_path / "megatron" / "release"
    found = ranks(2, "load_as_megatron_does", "transformer_engine", truth(tied).shape, layout, path)[0]
    assert all(tensor.equal(bf16_state(tied)[name]) for name, tensor in found.items())


def test_objects_of_a_checkpoint_are_never_unpickled(ranks: Any, tmp_path: Path) -> None:
    """Nor where the model has a place for them."""
    shape, state = truth(False).shape, bf16_state(False)
    ranks(2, "save", "transformer_engine", shape, TP2, state, tmp_path)
    hide_code_in_extra_state(tmp_path / "release", tmp_path / "it-ran")
    found = ranks(2, "load", "transformer_engine", shape, PP2, tmp_path / "release")[0]
    assert all(tensor.equal(state[name]) for name, tensor in found.items())
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("layout", [TP2, DISTRIBUTED], ids=["tp2", "dp2-distopt"])
@pytest.mark.parametrize(
    ("before", "after"), [("local", "transformer_engine"), ("transformer_engine", "local")], ids=["to-te", "to-local"]
)
def test_a_run_goes_on_under_the_other_spec(
    before: str, after: str, layout: ParallelConfig, ranks: Any, tmp_path: Path
) -> None:
    """Float32 weights, moments and step count: the second update is bit for bit that of a run which kept its spec."""
    shape, (first, second) = truth(False).shape, gradients(False)
    continued = {}
    for spec in (before, after):
        folder = tmp_path / spec
        weights, main, _ = ranks(2, "train", before, shape, layout, folder, bf16_state(False), first)[0]
        continued[spec] = ranks(2, "train", spec, shape, layout, folder, None, second)[0]
        assert all(tensor.equal(weights[name]) for name, tensor in continued[spec][2].items())
    for kept, changed in zip(continued[before], continued[after], strict=True):
        assert kept.keys() == changed.keys()
        assert all(tensor.equal(changed[name]) for name, tensor in kept.items())
    if not layout.use_distributed_optimizer:
        assert all((tensor != main[name]).any() for name, tensor in continued[after][1].items())


def test_a_precision_aware_optimizer_is_saved_in_float32_for_any(ranks: Any, tmp_path: Path) -> None:
    """Bit for bit, into one like it and into one that holds all in float32, which never knew of bfloat16 moments."""
    shape = truth(False).shape
    saved = ranks(2, "precision_aware", shape, DISTRIBUTED, tmp_path, bf16_state(False))
    for function, arguments, held_in in (("precision_aware", (None,), torch.bfloat16), ("plain", (), torch.float32)):
        for kept, found in zip(saved, ranks(2, function, shape, DISTRIBUTED, tmp_path, *arguments), strict=True):
            assert {dtype for _, _, dtype in found} == {held_in}
            for (master, moment, _), (found_master, found_moment, _) in zip(kept, found, strict=True):
                assert found_master.dtype == torch.float32 and found_master.equal(master)
                assert found_moment.equal(moment)
