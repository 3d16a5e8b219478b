"""Checkpoints: saved on one layout and continued on another; unfinished, foreign and hostile ones refused.

Not covered: a tensor that only some ranks lack (they alone raise, and torchrun ends the others), bfloat16, Transformer
Engine (test_transformer_engine.py), checkpoints of Megatron-LM itself, and two runs that write to one folder at a time.
"""

from __future__ import annotations

import os
import pickle
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from layouts import Layout, build_policy, fill_padding_rows, hf_weights, update
from torch import Tensor
from truth import Truth, one_update, truth, two_updates, worst_update
from world import RankError, World

from megatron_rlsc.conversion.folders import TRACKER, latest_checkpoint, step_dir
from megatron_rlsc.conversion.manifest import NAME as MANIFEST
from megatron_rlsc.conversion.manifest import check_sizes, sum_file, write_manifest
from megatron_rlsc.conversion.shape import ModelShape
from megatron_rlsc.disk import DiskError
from megatron_rlsc.policy.save import save_checkpoint, write_now
from megatron_rlsc.policy.saver import Saver
from megatron_rlsc.run_folder.checkpoints import sweep
from megatron_rlsc.types import Progress, Sample

TP2, PP2 = Layout(tp=2), Layout(pp=2)


def update_and_save(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], folder: Path, steps: int
) -> None:
    policy = build_policy(layout, shape, state)
    for step in range(1, steps + 1):
        update(policy, samples)
        policy.save(folder, step)


def save_weights(layout: Layout, shape: ModelShape, state: dict[str, Tensor], folder: Path) -> None:
    policy = build_policy(layout, shape, state)
    save_checkpoint(folder, None, chunks=policy.chunks, parallel=policy.parallel)


def resume_and_update(
    layout: Layout, shape: ModelShape, samples: list[Sample], folder: Path
) -> tuple[int, dict[str, Tensor]]:
    policy = build_policy(layout, shape, None)  # random weights
    step = policy.resume(folder).step
    fill_padding_rows(policy, 50.0)
    update(policy, samples)
    return step, hf_weights(policy)


def load_and_update(layout: Layout, shape: ModelShape, samples: list[Sample] | None, folder: Path) -> dict[str, Tensor]:
    policy = build_policy(layout, shape, None)
    policy.load(folder)
    if samples is not None:
        update(policy, samples)
    return hf_weights(policy)


def save_seven(world: World, layout: Layout, expected: Truth, folder: Path, steps: int = 1) -> None:
    arguments = (layout, expected.shape, expected.state, expected.batches["seven"], folder, steps)
    world.run(layout.ranks, update_and_save, *arguments)


def distributed(**sizes: Any) -> Layout:
    return Layout(**sizes, distributed_optimizer=True)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (TP2, PP2),
        (PP2, TP2),
        (TP2, Layout()),
        (TP2, Layout(tp=2, pp=2)),
        (PP2, Layout(tp=2, dp=2)),
        (Layout(dp=2), TP2),
        (distributed(dp=2), distributed(dp=2)),
        (distributed(dp=2), distributed(tp=2, dp=2)),
        (distributed(pp=2, dp=2), distributed(dp=2)),
        (PP2, Layout(pp=2, vpp=2)),
        (Layout(pp=2, vpp=2), TP2),
        (Layout(tp=2, sequence_parallel=True), Layout(cp=2)),
        (Layout(pp=2, cp=2), Layout(tp=2, pp=2, vpp=2, sequence_parallel=True)),
        (distributed(dp=2, overlap=True), distributed(pp=2, vpp=2, dp=2)),
        (distributed(pp=2, vpp=2, dp=2, overlap=True), distributed(cp=2, dp=2)),
    ],
    ids=lambda layout: str(layout),
)
def test_a_run_goes_on_at_another_layout(
    before: Layout, after: Layout, tied: bool, world: World, tmp_path: Path
) -> None:
    """The second update needs the first one's moments and step count; it is that of the run which never stopped."""
    expected = truth(tied)
    save_seven(world, before, expected, tmp_path)
    arguments = (after, expected.shape, expected.batches["three"], tmp_path)
    step, weights = world.run(after.ranks, resume_and_update, *arguments)[0]
    assert step == 1
    uninterrupted = two_updates(tied)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, uninterrupted[name], rtol=1e-5, atol=1e-6)
    assert worst_update(weights, uninterrupted, expected.state) < 1e-4


def resume_with_another_rate(
    layout: Layout, shape: ModelShape, samples: list[Sample], folder: Path
) -> tuple[list[float], dict[str, Tensor]]:
    policy = build_policy(layout, shape, None, lr=reference.LR / 2)
    policy.resume(folder)
    fill_padding_rows(policy, 50.0)
    update(policy, samples)
    return [group["lr"] for group in policy.optimizer.param_groups], hf_weights(policy)


@pytest.mark.parametrize("layout", [TP2, distributed(dp=2)], ids=str)
def test_a_resumed_run_has_its_own_learning_rate(layout: Layout, world: World, tmp_path: Path) -> None:
    """Half of it, from the first update on, which then moves the weights half as far."""
    expected = truth(False)
    save_seven(world, layout, expected, tmp_path)
    arguments = (layout, expected.shape, expected.batches["three"], tmp_path)
    rates, weights = world.run(2, resume_with_another_rate, *arguments)[0]
    assert set(rates) == {reference.LR / 2}
    first, second = one_update(False), two_updates(False)
    half = {name: (first[name] + second[name]) / 2 for name in second}
    assert worst_update(weights, half, expected.state) < 1e-4


def test_weights_alone_do_not_continue_a_run(world: World, tmp_path: Path) -> None:
    """What the test above would miss, were the optimizer's state not loaded: 1000 times its tolerance."""
    expected = truth(False)
    save_seven(world, TP2, expected, tmp_path)
    weights = world.run(2, load_and_update, PP2, expected.shape, expected.batches["three"], tmp_path)[0]
    assert worst_update(weights, two_updates(False), expected.state) > 0.1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_converted_model_is_loaded_bit_for_bit(tied: bool, world: World, tmp_path: Path) -> None:
    """Padded to 512 rows at TP 2, and to 384 at PP 2."""
    expected = truth(tied)
    world.run(2, save_weights, TP2, expected.shape, expected.state, tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "release"
    weights = world.run(2, load_and_update, PP2, expected.shape, None, tmp_path)[0]
    assert all(tensor.equal(expected.state[name]) for name, tensor in weights.items())
    assert weights.keys() == expected.shape.hf_tensors().keys()


def test_a_checkpoint_replaces_none_until_it_is_whole(world: World, tmp_path: Path) -> None:
    """A folder as a killed save leaves it is not the latest, and the next save of that step does not trip over it."""
    expected = truth(False)
    save_seven(world, TP2, expected, tmp_path)
    partial = tmp_path / ".iter_0000002.partial"
    partial.mkdir()
    (partial / "metadata.json").write_text("{}")
    (partial / "__0_0.distcp").write_bytes(b"torn")
    assert latest_checkpoint(tmp_path).name == "iter_0000001"
    save_seven(world, TP2, expected, tmp_path, steps=2)
    assert latest_checkpoint(tmp_path).name == "iter_0000002"
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", TRACKER]


def save_on_a_full_disk(layout: Layout, shape: ModelShape, state: dict[str, Tensor], folder: Path) -> str:
    """No file of this process, or of the writers that it starts, may grow beyond 4 KiB."""
    policy = build_policy(layout, shape, state)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        policy.save(folder, 2)
    except DiskError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return "none"


def test_a_save_that_fails_leaves_the_checkpoint_before_it(world: World, tmp_path: Path) -> None:
    expected = truth(False)
    save_seven(world, TP2, expected, tmp_path)
    errors = world.run(2, save_on_a_full_disk, TP2, expected.shape, expected.state, tmp_path)
    for error, cause in zip(errors, ("Worker failure: ", "rank 0 knows the cause"), strict=True):
        assert error.startswith(f"{tmp_path / 'iter_0000002'} could not be written ({cause}")
        assert error.endswith("What was there before is whole. Make room and start again; a run goes on with --resume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", TRACKER]
    assert latest_checkpoint(tmp_path).name == "iter_0000001"
    arguments = (TP2, expected.shape, expected.batches["three"], tmp_path)
    step, weights = world.run(2, resume_and_update, *arguments)[0]
    assert step == 1
    assert worst_update(weights, two_updates(False), expected.state) < 1e-4


def refusal_of_load(layout: Layout, shape: ModelShape, folder: Path) -> str:
    policy = build_policy(layout, shape, None)
    try:
        policy.load(folder)
    except ValueError as error:
        return str(error)
    return "none"


def refusal_of_resume(layout: Layout, shape: ModelShape, folder: Path) -> str:
    policy = build_policy(layout, shape, None)
    try:
        policy.resume(folder)
    except ValueError as error:
        return str(error)
    return "none"


def test_a_checkpoint_that_lacks_a_tensor_is_refused(world: World, tmp_path: Path) -> None:
    """A tied model's has no output layer."""
    world.run(2, save_weights, TP2, truth(True).shape, truth(True).state, tmp_path)
    for message in world.run(2, refusal_of_load, TP2, truth(False).shape, tmp_path):
        assert "release does not hold this model" in message
        assert "output_layer.weight" in message


def test_a_checkpoint_of_another_size_is_refused(world: World, tmp_path: Path) -> None:
    expected = truth(False)
    world.run(2, save_weights, TP2, expected.shape, expected.state, tmp_path)
    for other in (replace(expected.shape, num_hidden_layers=2), replace(expected.shape, intermediate_size=48)):
        for message in world.run(2, refusal_of_load, PP2, other, tmp_path):
            assert "release cannot be loaded into this model: Global shape mismatch" in message


def test_a_torn_shard_is_refused(world: World, tmp_path: Path) -> None:
    """By its manifest; and without one, as Megatron-LM's own checkpoints are, when it is read."""
    expected = truth(False)
    world.run(2, save_weights, TP2, expected.shape, expected.state, tmp_path)
    for file in (tmp_path / "release").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    for message in world.run(2, refusal_of_load, TP2, expected.shape, tmp_path):
        assert "release is not as it was written: __0_0.distcp has " in message
    (tmp_path / "release" / MANIFEST).unlink()
    for message in world.run(2, refusal_of_load, TP2, expected.shape, tmp_path):
        assert "release cannot be loaded into this model: " in message


def test_what_has_no_fitting_optimizer_is_refused_with_the_reason(world: World, tmp_path: Path) -> None:
    expected = truth(False)
    world.run(2, save_weights, TP2, expected.shape, expected.state, tmp_path / "weights")
    for message in world.run(2, refusal_of_resume, PP2, expected.shape, tmp_path / "weights"):
        assert "release holds weights alone" in message
    save_seven(world, TP2, expected, tmp_path / "plain")
    for message in world.run(2, refusal_of_resume, distributed(dp=2), expected.shape, tmp_path / "plain"):
        assert "was saved without --use-distributed-optimizer" in message
    save_seven(world, distributed(dp=2), expected, tmp_path / "sharded")
    for message in world.run(2, refusal_of_resume, PP2, expected.shape, tmp_path / "sharded"):
        assert "was saved with --use-distributed-optimizer" in message


class Run:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def hide_code_in_extra_state(path: Path, marker: Path) -> None:
    """Every object of a checkpoint that torch would unpickle becomes one that runs a command."""
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 made by this test
    evil = path / "evil.distcp"
    torch.save(Run(marker), evil)
    for index, info in metadata.storage_data.items():
        if "_extra_state" in index.fqn:
            info.relative_path, info.offset, info.length = evil.name, 0, evil.stat().st_size
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    seal_again(path)


def seal_again(path: Path) -> None:
    """Whoever can change a file can write its checksum."""
    write_manifest(path, [sum_file(file) for file in path.iterdir() if file.name != MANIFEST])


def test_objects_of_a_checkpoint_are_never_unpickled(world: World, tmp_path: Path) -> None:
    expected = truth(False)
    world.run(2, save_weights, TP2, expected.shape, expected.state, tmp_path / "model")
    hide_code_in_extra_state(tmp_path / "model" / "release", tmp_path / "it-ran")
    weights = world.run(2, load_and_update, PP2, expected.shape, None, tmp_path / "model")[0]
    assert all(tensor.equal(expected.state[name]) for name, tensor in weights.items())
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_file_that_would_run_something_is_refused(file: str, world: World, tmp_path: Path) -> None:
    """In the place of each file of a run's checkpoint that torch or Megatron unpickles."""
    expected, path = truth(False), step_dir(tmp_path, 1)
    save_seven(world, TP2, expected, tmp_path)
    if file == ".metadata":
        (path / file).write_bytes(pickle.dumps(Run(tmp_path / "it-ran")))
    else:
        torch.save(Run(tmp_path / "it-ran"), path / file)
    seal_again(path)
    with pytest.raises(RankError, match="system"):
        world.run(2, resume_and_update, TP2, expected.shape, expected.batches["three"], tmp_path)
    assert not (tmp_path / "it-ran").exists()


def save_behind_an_update(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: Any, folder: Path
) -> str:
    """The checkpoint after the first update is written while the second one is made."""
    policy = build_policy(layout, shape, state)
    update(policy, samples)
    saver = Saver(
        folder, policy, behind=True, keep_last=0, keep_best="", metrics=folder / "none", settings="[train]\n", saved=0
    )
    saver.save(Progress(step=1, prompts=7, pushes=2, version="v:1"))
    named = sorted(path.name for path in folder.iterdir())
    update(policy, samples)
    saver.wait()
    return " ".join(named)


@pytest.mark.parametrize("layout", [TP2, distributed(pp=2, dp=2)], ids=str)
def test_a_save_behind_the_next_update_is_of_the_one_before(layout: Layout, world: World, tmp_path: Path) -> None:
    expected = truth(False)
    arguments = (layout, expected.shape, expected.state, expected.batches["seven"], tmp_path)
    before = world.run(layout.ranks, save_behind_an_update, *arguments)
    assert all(TRACKER not in names and ".iter_0000001.partial-" in names for names in before)
    assert latest_checkpoint(tmp_path).name == "iter_0000001"
    assert len(check_sizes(step_dir(tmp_path, 1))) == 2 * layout.ranks + 4
    assert (step_dir(tmp_path, 1) / "config.toml").read_text() == "[train]\n"
    arguments = (layout, expected.shape, expected.batches["three"], tmp_path)
    step, weights = world.run(layout.ranks, resume_and_update, *arguments)[0]
    assert step == 1
    assert worst_update(weights, two_updates(False), expected.state) < 1e-4


def resume_alone(layout: Layout, shape: ModelShape, folder: Path) -> tuple[Progress, Tensor]:
    policy = build_policy(layout, shape, None)
    torch.manual_seed(9)
    return policy.resume(folder), torch.rand(3)


def save_in_the_middle_of_a_row(
    layout: Layout, shape: ModelShape, state: dict[str, Tensor], samples: list[Sample], folder: Path
) -> Tensor:
    """Every rank has drawn as many numbers as its number says."""
    policy = build_policy(layout, shape, state)
    update(policy, samples)
    torch.manual_seed(1)
    torch.rand(policy.parallel.rank)
    progress = Progress(step=3, prompts=40, pushes=5, version="run:4")
    write_now(policy.begin_save(folder, progress), policy.parallel)
    return torch.rand(3)


def test_progress_and_generators_come_back(world: World, tmp_path: Path) -> None:
    """Each rank's own generator at any layout of as many ranks; the progress at any."""
    expected = truth(False)
    arguments = (TP2, expected.shape, expected.state, expected.batches["seven"], tmp_path)
    drawn = world.run(2, save_in_the_middle_of_a_row, *arguments)
    assert not torch.equal(*drawn)
    for layout in (TP2, PP2):
        for (progress, numbers), wanted in zip(world.run(2, resume_alone, layout, expected.shape, tmp_path), drawn):
            assert progress == Progress(step=3, prompts=40, pushes=5, version="run:4")
            assert torch.equal(numbers, wanted)
    torch.manual_seed(9)
    progress, numbers = world.run(1, resume_alone, Layout(), expected.shape, tmp_path)[0]
    assert progress.prompts == 40 and torch.equal(numbers, torch.rand(3))
