"""HF -> Megatron -> HF by blocks, without Megatron: bitwise, whole or not at all, and bad sources refused.

Loading into models is tests/policy/test_converted.py; damage of the readers is with their own tests.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TinyModel, save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_rlsc.conversion import plan as plan_module
from megatron_rlsc.conversion.blocks import BLOCK_BYTES, cut
from megatron_rlsc.conversion.convert import convert, plan_hf, plan_megatron
from megatron_rlsc.conversion.folders import latest_checkpoint
from megatron_rlsc.conversion.hf import open_weights
from megatron_rlsc.conversion.layout import segments, shard
from megatron_rlsc.conversion.manifest import check_sizes, check_sums, read_manifest
from megatron_rlsc.conversion.plan import megatron_blocks, megatron_objects, megatron_rules, megatron_tensors
from megatron_rlsc.disk import DiskError


def to_megatron(hf_dir: Path, target: Path, dtype: torch.dtype | None = None, **options) -> Path:
    convert(plan_megatron(hf_dir, target, dtype=dtype, overwrite=options.pop("overwrite", False)), **options)
    return target


def to_hf(megatron_dir: Path, target: Path, *, reference_dir=None, max_shard_size=10**9, overwrite=False) -> Path:
    plan = plan_hf(
        megatron_dir, target, reference_dir=reference_dir, max_shard_size=max_shard_size, overwrite=overwrite
    )
    convert(plan)
    return target


def weights_of(hf_dir: Path) -> dict[str, Tensor]:
    return {name: tensor for path in hf_dir.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(tensor.dtype == expected[name].dtype for name, tensor in found.items())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows a block, so that the tiny model is cut as a large one is."""
    monkeypatch.setattr(plan_module, "cut", lambda rows, row_bytes: cut(rows, row_bytes, block_bytes=300))


def test_blocks_are_all_rows_once_and_small():
    for rows, row_bytes in ((1, 10**9), (151936, 16384), (152064, 16384), (29568, 16384), (10240, 16384), (7, 1)):
        pieces = cut(rows, row_bytes)
        assert [start for start, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
        assert (pieces[0][0], pieces[-1][1]) == (0, rows)
        assert max(stop - start for start, stop in pieces) * row_bytes <= max(BLOCK_BYTES, row_bytes)


def test_segments_are_shard_with_one_rank(tiny):
    weights = open_weights(tiny.hf_dir)
    for rule in megatron_rules(weights.shape):
        tensors = [weights.tensor(name) for name in rule.hf]
        copies = [tensors[s.hf][s.hf_row : s.hf_row + s.rows] for s in segments(rule, weights.shape)]
        assert torch.equal(torch.cat(copies), shard(rule.layout, tensors, weights.shape, tp_rank=0, tp_size=1))


@pytest.mark.parametrize("max_shard_size", [10**9, 20_000, 1])
def test_round_trip_is_bitwise(tiny, tmp_path, small_blocks, max_shard_size):
    back = to_hf(to_megatron(tiny.hf_dir, tmp_path / "m"), tmp_path / "back", max_shard_size=max_shard_size)
    assert_same(weights_of(back), tiny.state)
    assert open_weights(back).shape == open_weights(tiny.hf_dir).shape
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (tiny.hf_dir / name).read_bytes()


def test_shards_are_read_as_one_file_is(sharded, tmp_path):
    assert_same(weights_of(to_hf(to_megatron(sharded.hf_dir, tmp_path / "m"), tmp_path / "back")), sharded.state)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [None, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(untied, tmp_path, small_blocks, source, target):
    """Cast as torch casts; config.json names the dtype."""
    state = {name: tensor.to(source) for name, tensor in untied.state.items()}
    save_file(state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    back = to_hf(to_megatron(untied.hf_dir, tmp_path / "m", target), tmp_path / "back")
    expected = {name: tensor.to(target or source) for name, tensor in state.items()}
    assert_same(weights_of(back), expected)
    assert f"torch.{json.loads((back / 'config.json').read_text())['dtype']}" == str(target or source)


def test_every_bit_of_half_floats_comes_back(untied, tmp_path):
    """Negative zeros and subnormal numbers too: all finite bfloat16s."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = torch.where(every.isfinite(), every, torch.zeros_like(every))
    state = {
        name: every[torch.arange(tensor.numel()) * 37 % 2**16].view(tensor.shape)
        for name, tensor in untied.state.items()
    }
    save_file(state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    back = weights_of(to_hf(to_megatron(untied.hf_dir, tmp_path / "m"), tmp_path / "back"))
    assert all(torch.equal(back[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in state.items())


def test_what_is_written_does_not_depend_on_the_workers(untied, tmp_path, small_blocks, monkeypatch):
    monkeypatch.setattr(plan_module, "FILE_BYTES", 10_000)
    manifests = []
    for workers in (1, 3):
        target = tmp_path / f"m{workers}"
        plan = replace(plan_megatron(untied.hf_dir, target, dtype=None, overwrite=False), max_shard_size=10_000)
        convert(plan, workers=workers)
        manifests.append(read_manifest(target / "release"))
    archives = [[file for file in manifest if file.name.endswith(".distcp")] for manifest in manifests]
    assert archives[0] == archives[1] and len(archives[0]) > 3


def test_megatron_s_names_and_shapes(tiny, tmp_path):
    """What torch.distributed.checkpoint itself reads of it. Equal to a real save's: tests/policy/test_converted.py."""
    path = latest_checkpoint(to_megatron(tiny.hf_dir, tmp_path / "m"))
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    shape = open_weights(tiny.hf_dir).shape
    sizes = {key: tuple(entry.size) for key, entry in found.items() if hasattr(entry, "chunks")}
    assert sizes == megatron_tensors(shape)
    assert found.keys() - sizes.keys() == set(megatron_objects(shape))
    assert sizes["decoder.layers.mlp.linear_fc1.weight"] == (2, 96, 32)
    assert ("output_layer.weight" in sizes) != shape.tie_word_embeddings


def test_memory_is_a_few_blocks(tmp_path):
    """Of a model of any size: no block is larger, and a reader keeps one of them."""
    model = save_tiny(tmp_path / "tiny", tied=False)
    shape = replace(open_weights(model.hf_dir).shape, vocab_size=152064, hidden_size=8192, intermediate_size=29568)
    shape = replace(shape, num_attention_heads=64, num_key_value_heads=8, head_dim=128, num_hidden_layers=1)
    entry = next(iter(open_weights(model.hf_dir).entries.values()))
    entries = {name: replace(entry, name=name, shape=size) for name, size in shape.hf_tensors().items()}
    weights = replace(open_weights(model.hf_dir), shape=shape, entries=entries)
    blocks = list(megatron_blocks(weights, torch.bfloat16))
    assert max(one.block.nbytes(torch.bfloat16) for one in blocks) <= BLOCK_BYTES
    assert sum(one.block.nbytes(torch.bfloat16) for one in blocks) == 2 * sum(
        torch.Size(size).numel() for size in shape.hf_tensors().values()
    )


# Whole or not at all


def test_a_source_is_never_overwritten(untied, tmp_path):
    before = {path.name: path.read_bytes() for path in untied.hf_dir.iterdir()}
    for target in (untied.hf_dir, tmp_path):
        with pytest.raises(ValueError, match=r"holds the source|something other than a Megatron checkpoint"):
            to_megatron(untied.hf_dir, target, overwrite=True)
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    with pytest.raises(ValueError, match=r"something other than a model|holds the source"):
        to_hf(megatron, megatron, overwrite=True)
    with pytest.raises(ValueError, match="holds the source"):
        to_hf(megatron, untied.hf_dir, reference_dir=untied.hf_dir, overwrite=True)
    assert {path.name: path.read_bytes() for path in untied.hf_dir.iterdir()} == before


def test_a_target_in_use_is_replaced_on_demand_by_a_whole_one(tiny, tmp_path):
    megatron = to_megatron(tiny.hf_dir, tmp_path / "m")
    with pytest.raises(ValueError, match="in use"):
        to_megatron(tiny.hf_dir, megatron)
    to_megatron(tiny.hf_dir, megatron, torch.bfloat16, overwrite=True)
    back = to_hf(megatron, tmp_path / "back")
    assert_same(weights_of(back), {name: tensor.bfloat16() for name, tensor in tiny.state.items()})


def test_an_interrupted_run_leaves_nothing_and_the_next_one_says_so(untied, tmp_path):
    (tmp_path / ".m.partial" / "release").mkdir(parents=True)
    plan = plan_megatron(untied.hf_dir, tmp_path / "m", dtype=None, overwrite=False)
    assert any("what an interrupted run left" in line for line in plan.describe())

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    convert(plan)
    assert not any("interrupted run" in line for line in plan.describe()) and (tmp_path / "m").exists()


def test_no_room_is_said_before_anything_is_written(untied, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_rlsc.conversion.convert.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskError, match=r"has 1\.0 kB free, the weights take"):
        plan_megatron(untied.hf_dir, tmp_path / "m", dtype=None, overwrite=False)


def test_a_folder_that_may_not_be_written(untied, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file: File exists: a file is where a folder is to be"):
        to_megatron(untied.hf_dir, tmp_path / "file" / "m")


def test_a_plan_writes_nothing(tiny, tmp_path):
    lines = "\n".join(plan_megatron(tiny.hf_dir, tmp_path / "m", dtype=torch.bfloat16, overwrite=False).describe())
    assert "of 2 layers" in lines and "free" in lines and "are of another dtype and cast to bfloat16" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


# Bad sources


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_tensor_that_is_not_finite_is_named(untied, tmp_path, small_blocks, value):
    bad = ["model.layers.1.self_attn.k_proj.bias", "lm_head.weight"]
    for name in bad:
        untied.state[name].view(-1)[-1] = value
    save_file(untied.state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"2 of the 27 tensors of .* hold NaN or infinity.*: lm_head\.weight, model\."):
        to_megatron(untied.hf_dir, tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_what_a_cast_makes_infinite_is_named(untied, tmp_path):
    untied.state["model.norm.weight"][0] = 1e5  # float16 ends at 65504
    save_file(untied.state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinity, in torch\.float16.*: model\.norm\.weight"):
        to_megatron(untied.hf_dir, tmp_path / "m", torch.float16)


def test_a_checkpoint_of_another_model_lists_all_that_differs(untied, tmp_path):
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    config = json.loads((megatron / "hf/config.json").read_text())
    lie = {**config, "num_hidden_layers": 3, "tie_word_embeddings": True, "intermediate_size": 40}
    (megatron / "hf/config.json").write_text(json.dumps(lie))
    with pytest.raises(ValueError) as error:
        to_hf(megatron, tmp_path / "back")
    for line in (
        "unexpected output_layer.weight (50, 32)",
        "decoder.layers.mlp.linear_fc1.weight is (2, 96, 32), should be (3, 80, 32)",
        "decoder.layers.self_attention.linear_qkv.bias is (2, 48), should be (3, 48)",
    ):
        assert line in str(error.value)


def change_metadata(path: Path, change) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 made by this test
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"]["size"] = (path / ".metadata").stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))


KEY = "decoder.layers.mlp.linear_fc2.weight"


def drop_a_chunk(metadata) -> None:
    metadata.state_dict_metadata[KEY].chunks.pop()


def overlap_chunks(metadata) -> None:
    chunks = metadata.state_dict_metadata[KEY].chunks
    chunks[-1] = chunks[0]


def point_outside(metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../../tiny/model.safetensors"


def point_beyond_the_end(metadata) -> None:
    for info in metadata.storage_data.values():
        info.offset += 10**9


def point_at_each_other(metadata) -> None:
    infos = list(metadata.storage_data.values())
    for a, b in zip(infos, [*infos[1:], infos[0]]):
        a.offset, a.length = b.offset, b.length


def name_an_absent_file(metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "__7_0.distcp"


def forget_storage(metadata) -> None:
    metadata.storage_data = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_chunk, "leave gaps or overlap"),
        (overlap_chunks, "leave gaps or overlap"),
        (point_outside, "names a file outside its folder"),
        (point_beyond_the_end, "truncated or damaged"),
        (point_at_each_other, "damaged"),
        (name_an_absent_file, r"lacks 1 of its files: __7_0\.distcp"),
        (forget_storage, "damaged"),
    ],
)
def test_metadata_that_is_not_true(untied, tmp_path, change, message):
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    change_metadata(megatron / "release", change)
    with pytest.raises(ValueError, match=message):
        to_hf(megatron, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_that_is_not_there_or_not_whole(untied, tmp_path):
    with pytest.raises(ValueError, match="no Megatron checkpoint"):
        to_hf(untied.hf_dir, tmp_path / "back")
    megatron = to_megatron(untied.hf_dir, tmp_path / "m")
    (megatron / "release/manifest.json").unlink()
    archive = megatron / "release/__0_0.distcp"
    archive.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its files: __0_0\.distcp"):
        to_hf(megatron, tmp_path / "back")


def test_the_manifest_finds_damage(tiny, tmp_path):
    megatron = to_megatron(tiny.hf_dir, tmp_path / "m")
    back = to_hf(megatron, tmp_path / "back", max_shard_size=20_000)
    for folder, name in (
        (megatron / "release", "__0_0.distcp"),
        (back, min(path.name for path in back.glob("model-*"))),
    ):
        files = check_sizes(folder)
        assert name in {file.name for file in files}
        check_sums(folder, files)
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        check_sizes(folder)
        with pytest.raises(ValueError, match=f"{name} has changed.*Copy or convert it again"):
            check_sums(folder, files)
        (folder / name).write_bytes(data[:-1])
        with pytest.raises(ValueError, match=f"{name} has {len(data) - 1} bytes, not {len(data)}"):
            check_sizes(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is absent"):
            check_sizes(folder)


def test_a_manifest_that_is_none(untied):
    assert read_manifest(untied.hf_dir) is None and check_sizes(untied.hf_dir) == []
    for text in ("{", "[]", "{}", '{"format": 1, "files": {"a": 1}}', '{"format": 2, "files": {}}'):
        (untied.hf_dir / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest"):
            read_manifest(untied.hf_dir)
    outside = {"format": 1, "files": {"../a": {"size": 1, "sha256": ""}}}
    (untied.hf_dir / "manifest.json").write_text(json.dumps(outside))
    with pytest.raises(ValueError, match="no manifest of format 1"):
        read_manifest(untied.hf_dir)


def test_a_tied_model_with_a_copy_is_converted_without_it(tmp_path):
    model: TinyModel = save_tiny(tmp_path / "tiny", tied=True)
    copy = {**model.state, "lm_head.weight": model.state["model.embed_tokens.weight"].clone()}
    save_file(copy, model.hf_dir / "model.safetensors", metadata={"format": "pt"})
    assert_same(weights_of(to_hf(to_megatron(model.hf_dir, tmp_path / "m"), tmp_path / "back")), model.state)
