"""What conversion/ writes without Megatron, in models that Megatron builds: loaded at any layout, and exported again.

Every published size's ratio of heads to KV heads, small. Not covered: Transformer Engine (test_transformer_engine.py),
and the sizes themselves (benchmarks/convert.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import Layout, build_policy, hf_weights, pack_for, update
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import Qwen2Config, Qwen2ForCausalLM
from truth import truth
from world import World

from megatron_rlsc.conversion.convert import convert, plan_hf, plan_megatron
from megatron_rlsc.conversion.hf import copy_config_files, open_weights
from megatron_rlsc.conversion.megatron_forward import MegatronForward
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.conversion.torch_dist import open_torch_dist
from megatron_rlsc.policy.save import save_checkpoint
from megatron_rlsc.types import Sample

HEADS = {
    "0.5B": (14, 2),
    "1.5B": (12, 2),
    "3B": (16, 2),
    "7B": (28, 4),
    "14B and 32B": (40, 8),
    "72B": (64, 8),
}
"""Attention heads and KV heads, as published."""
TIED = ("0.5B", "1.5B", "3B")


def save_model(folder: Path, size: str, *, vocab_size: int = 259, layers: int = 4) -> dict[str, Tensor]:
    heads, kv_heads = HEADS[size]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=4 * heads,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=size in TIED,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def to_megatron(hf_dir: Path, target: Path) -> Path:
    convert(plan_megatron(hf_dir, target, dtype=None, overwrite=False))
    return target


def to_hf(megatron_dir: Path, target: Path) -> dict[str, Tensor]:
    convert(plan_hf(megatron_dir, target, reference_dir=None, max_shard_size=10**9, overwrite=False))
    return load_file(target / "model.safetensors")


def load_and_save(layout: Layout, shape: ModelShape, source: Path, target: Path) -> dict[str, Tensor]:
    policy = build_policy(layout, shape, None)
    policy.load(source)
    save_checkpoint(target, None, chunks=policy.chunks, parallel=policy.parallel)
    return hf_weights(policy)


def load_as_megatron_does(layout: Layout, shape: ModelShape, path: Path) -> dict[str, Tensor]:
    """Nothing said of strictness."""
    policy = build_policy(layout, shape, None)
    names = ["model"] if len(policy.chunks) == 1 else [f"model{i}" for i in range(len(policy.chunks))]
    sharded = {name: chunk.sharded_state_dict(metadata={}) for name, chunk in zip(names, policy.chunks, strict=True)}
    loaded = dist_checkpointing.load(sharded, str(path))
    for name, chunk in zip(names, policy.chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    return hf_weights(policy)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ("0.5B", Layout(tp=2)),
        ("0.5B", Layout(pp=4)),
        ("1.5B", Layout(tp=4)),
        ("3B", Layout(tp=2, pp=2, vpp=2)),
        ("7B", Layout(tp=4)),
        ("7B", Layout(pp=2, vpp=2, dp=2)),
        ("14B and 32B", Layout(tp=4)),
        ("14B and 32B", Layout(tp=2, pp=2)),
        ("72B", Layout(tp=4)),
        ("72B", Layout(pp=2, vpp=2)),
    ],
    ids=str,
)
def test_every_size_loads_at_any_layout_and_comes_back(size: str, layout: Layout, world: World, tmp_path: Path) -> None:
    """HF -> checkpoint -> ranks -> their own checkpoint -> HF. 259 rows are padded at every TP."""
    state = save_model(tmp_path / "hf", size)
    shape = open_weights(tmp_path / "hf").shape
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    loaded = world.run(layout.ranks, load_and_save, layout, shape, megatron, tmp_path / "saved")[0]
    assert_same(loaded, state)
    copy_config_files(tmp_path / "hf", tmp_path / "saved" / "hf")
    assert_same(to_hf(tmp_path / "saved", tmp_path / "back"), state)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, vpp=2)], ids=str)
def test_megatron_loads_it_at_its_default_strictness(layout: Layout, tied: bool, world: World, tmp_path: Path) -> None:
    state = save_model(tmp_path / "hf", "1.5B" if tied else "7B")
    shape = open_weights(tmp_path / "hf").shape
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    loaded = world.run(layout.ranks, load_as_megatron_does, layout, shape, megatron / "release")[0]
    assert_same(loaded, state)


@pytest.mark.parametrize("vocab_size", [151936, 152064])
def test_the_published_vocabularies(vocab_size: int, world: World, tmp_path: Path) -> None:
    """Neither is padded at TP 1; at TP 4, where 512 must divide the rows, the smaller one is, to the larger."""
    state = save_model(tmp_path / "hf", "1.5B", vocab_size=vocab_size, layers=1)
    shape = open_weights(tmp_path / "hf").shape
    megatron = to_megatron(tmp_path / "hf", tmp_path / "megatron")
    arguments = (Layout(tp=4), shape, megatron, tmp_path / "saved")
    assert_same(world.run(4, load_and_save, *arguments)[0], state)
    copy_config_files(tmp_path / "hf", tmp_path / "saved" / "hf")
    assert_same(to_hf(tmp_path / "saved", tmp_path / "back"), state)


def train_and_save(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], folder: Path
) -> dict[str, Tensor]:
    policy = build_policy(layout, shape, state)
    update(policy, samples)
    policy.save(folder, 3)
    return hf_weights(policy)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(pp=2, vpp=2, dp=2, distributed_optimizer=True)], ids=str)
def test_what_training_saved_is_exported_without_its_optimizer(
    layout: Layout, tied: bool, world: World, tmp_path: Path
) -> None:
    expected = truth(tied)
    arguments = (layout, expected.shape, expected.state, expected.batches["seven"], tmp_path / "run")
    weights = world.run(layout.ranks, train_and_save, *arguments)[0]
    save_config(tied, tmp_path / "run" / "hf")
    assert_same(to_hf(tmp_path / "run", tmp_path / "back"), weights)


def save_config(tied: bool, folder: Path) -> None:
    from reference import tiny_qwen

    tiny_qwen(tied=tied).config.save_pretrained(folder)


def refusal_of_load(layout: Layout, shape: ModelShape, folder: Path) -> str:
    try:
        build_policy(layout, shape, None).load(folder)
    except ValueError as error:
        return str(error)
    return "none"


def test_a_flipped_bit_is_refused_on_every_rank(world: World, tmp_path: Path) -> None:
    """In the middle of a weight: still finite, and nothing but the checksum would tell."""
    save_model(tmp_path / "hf", "7B")
    shape = open_weights(tmp_path / "hf").shape
    archive = to_megatron(tmp_path / "hf", tmp_path / "megatron") / "release" / "__0_0.distcp"
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)
    for message in world.run(2, refusal_of_load, Layout(tp=2), shape, tmp_path / "megatron"):
        assert "__0_0.distcp has changed. Copy or convert it again" in message


def save_from_ranks(layout: Layout, shape: ModelShape, state: dict[str, Tensor], folder: Path) -> None:
    policy = build_policy(layout, shape, state)
    save_checkpoint(folder, None, chunks=policy.chunks, parallel=policy.parallel)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_its_entries_are_those_of_a_real_save(tied: bool, world: World, tmp_path: Path) -> None:
    """Keys, dtypes and global shapes; the padding of the vocabulary left out."""
    state = save_model(tmp_path / "hf", "1.5B" if tied else "7B", vocab_size=256)
    shape = open_weights(tmp_path / "hf").shape
    to_megatron(tmp_path / "hf", tmp_path / "megatron")
    world.run(2, save_from_ranks, Layout(pp=2), shape, state, tmp_path / "real")
    found, real = (
        {
            key: (entry.properties.dtype, tuple(entry.size)) if hasattr(entry, "size") else None
            for key, entry in FileSystemReader(tmp_path / name / "release").read_metadata().state_dict_metadata.items()
        }
        for name in ("megatron", "real")
    )
    assert found == real


def score(layout: Layout, shape: ModelShape, folder: Path, samples: list[Sample]) -> Tensor:
    policy = build_policy(layout, shape, None, temperature=1.0)
    policy.load(folder)
    return policy.score(pack_for(policy, samples), len(samples)).logprobs


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_log_probabilities_of_verify_are_megatron_core_s(tied: bool, world: World, tmp_path: Path) -> None:
    expected = truth(tied)
    samples = expected.batches["three"]
    world.run(1, save_from_ranks, Layout(), expected.shape, expected.state, tmp_path)
    scored = world.run(2, score, Layout(tp=2), expected.shape, tmp_path, samples)[0]
    forward = MegatronForward(checkpoint=open_torch_dist(tmp_path / "release"), shape=expected.shape)
    texts = [torch.tensor(sample.prompt_token_ids + sample.response_token_ids) for sample in samples]
    hidden = forward.embed(texts)
    for index in range(expected.shape.num_hidden_layers):
        hidden = forward.layer(index, hidden)
    logprobs = forward.logprobs(hidden, texts)
    ours = torch.stack([line[-len(s.response_token_ids) :].sum() for line, s in zip(logprobs, samples)])
    torch.testing.assert_close(ours, scored.float(), rtol=1e-5, atol=1e-4)
