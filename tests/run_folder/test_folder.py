"""A run's folder: one live run at a time, what a resumed run may not change, what `overwrite` deletes, and room.

Not covered: locks over a network (their absence is), and what a run makes of its folder (tests/test_train.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlsc.config import (
    KEPT_BY_RESUME,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlsc.conversion.folders import set_latest
from megatron_rlsc.conversion.shape import ModelShape, read_shape
from megatron_rlsc.recipe import load_recipe
from megatron_rlsc.run_folder.folder import LOCK, check_run_dir, open_run_dir
from megatron_rlsc.run_folder.journal import Journal


@pytest.fixture
def config(base_model: Path, tmp_path: Path) -> Config:
    (tmp_path / "q.jsonl").write_text('{"problem": "1+2"}\n')
    return Config(
        model=ModelConfig(load=base_model),
        data=DataConfig(data_path=tmp_path / "q.jsonl"),
        train=TrainConfig(output_dir=tmp_path / "run"),
    )


def open_and_close(config: Config, *, shape: ModelShape | None = None, **train: object) -> None:
    config = replace(config, train=replace(config.train, **train))
    shape = shape or read_shape(config.model.load)
    with open_run_dir(config.train.output_dir, config, config.model.load, shape):
        pass


@pytest.fixture
def run(config: Config) -> Path:
    """The folder of a run that has done a step."""
    open_and_close(config)
    folder = config.train.output_dir
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "step-000001.jsonl").write_text("{}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One live run at a time

HOLDER = """
import sys, time
from pathlib import Path
from megatron_rlsc.recipe import load_recipe
from megatron_rlsc.conversion.folders import set_latest
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.run_folder.folder import open_run_dir
config = load_recipe(Path(sys.argv[1]))
with open_run_dir(config.train.output_dir, config, config.model.load, read_shape(config.model.load)):
    print("mine", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(config: Config, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, with the folder open."""
    open_and_close(config)
    recipe = tmp_path / "holder.toml"
    shutil.copyfile(config.train.output_dir / "config.toml", recipe)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, recipe], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=["plain", "resume", "overwrite"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_live_run_keeps_its_folder(
    config: Config, holder: subprocess.Popen[str], flags: dict[str, bool], step: int
) -> None:
    """Before its first step, and after; a run that was killed keeps nothing from anybody."""
    folder = config.train.output_dir
    if step:
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(folder)
    told = rf"belongs to a run that is alive, process {holder.pid} on {socket.gethostname()}: end that one first"
    with pytest.raises(ValueError, match=told):
        open_and_close(config, **flags)
    assert contents(folder) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    open_and_close(config, **(flags or {"resume": True}))
    assert (folder / "metrics.jsonl").exists() == (step == 1 and flags != {"overwrite": True})


def test_a_run_that_ended_lets_go(config: Config) -> None:
    for _ in range(2):
        open_and_close(config)


def test_a_lock_that_was_deleted_is_no_lock(config: Config) -> None:
    """Someone emptied the folder under a live run: the next run has a lock of its own, that a third one minds."""
    shape, folder = read_shape(config.model.load), config.train.output_dir
    with open_run_dir(folder, config, config.model.load, shape):
        shutil.rmtree(folder)
        with open_run_dir(folder, config, config.model.load, shape):
            with pytest.raises(ValueError, match="belongs to a run that is alive"):
                open_and_close(config)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_warned_of(config, monkeypatch, capsys, number):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    open_and_close(config)
    assert f"warning: the file system of {config.train.output_dir} has no locks" in capsys.readouterr().err


# What a resumed run keeps

OTHER = {
    "prompt_template": "{problem}=",
    "apply_chat_template": False,
    "prompts_per_step": 7,
    "samples_per_prompt": 3,
    "temperature": 0.7,
    "max_response_length": 9,
    "rollout_lead": 1,
    "replay_rollouts": Path("journal"),
    "objective": "ttrl",
    "alpha": 0.2,
    "power": 0.7,
    "weight_scale": "batch-max",
    "seed": 5,
}
"""Another value of each setting, but for the files."""
SECTION = {name: section for section, names in KEPT_BY_RESUME.items() for name in names}


def changed(config: Config, **values: object) -> Config:
    for name, value in values.items():
        section = getattr(config, SECTION[name])
        config = replace(config, **{SECTION[name]: replace(section, **{name: value})})
    return config


def test_every_setting_that_is_kept_has_a_test() -> None:
    assert OTHER.keys() | {"load", "data_path"} == SECTION.keys()


@pytest.mark.parametrize("name", OTHER)
def test_another_objective_or_other_data_are_refused_unless_named(config: Config, run: Path, name: str) -> None:
    before = contents(run)
    other = changed(config, **{name: OTHER[name]})
    with pytest.raises(ValueError, match=rf"^--resume would go on with .*/run under other settings.*: {name} .* -> "):
        open_and_close(other, resume=True)
    assert contents(run) == before
    open_and_close(other, resume=True, allow_changed=(name,))
    assert getattr(getattr(load_recipe(run / "config.toml"), SECTION[name]), name) == OTHER[name]
    open_and_close(other, resume=True)  # from now on it is the run's


@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, [1, 2, 3, 4]),
        ({"parallel": {"tensor_model_parallel_size": 2}}, [1, 2, 3, 4]),
        ({"train": {"train_iters": 50}}, [1, 2, 3, 4]),
        ({"optimizer": {"lr": 2e-5}}, [1, 2, 3]),
        ({"train": {"updates_per_rollout": 2}}, [1, 2, 3]),
        ({"objective": {"alpha": 0.2}}, [1, 2, 3]),
        ({"rollout": {"temperature": 0.7}}, [1, 2]),
        ({"data": {"prompts_per_step": 7}}, [1, 2]),
    ],
    ids=str,
)
def test_what_of_the_journal_the_run_would_sample_itself(
    config: Config, run: Path, changes: dict[str, dict[str, object]], left: list[int], lead: int
) -> None:
    """The checkpoint is of step 2: what was sampled for step 3 is of its weights, and for step 4 of an update more.
    With a lead each is of a step earlier's."""
    if lead:
        open_and_close(changed(config, rollout_lead=1), resume=True, allow_changed=("rollout_lead",))
        config, left = changed(config, rollout_lead=1), [1, 2, 3, 4] if 3 in left else left
    for step in range(1, 5):
        Journal(run / "rollouts").path(step).write_text("{}\n")
    (run / "checkpoints" / "iter_0000002").mkdir(parents=True)
    (run / "checkpoints" / "iter_0000002" / "metadata.json").write_text("{}")
    set_latest(run / "checkpoints", 2)
    other = config
    for section, values in changes.items():
        other = replace(other, **{section: replace(getattr(other, section), **values)})
    allowed = tuple(name for values in changes.values() for name in values if name in SECTION)
    open_and_close(other, resume=True, allow_changed=allowed)
    names = [path.name for path in sorted((run / "rollouts").iterdir())]
    assert names == [Journal(run).path(step).name for step in left]


def test_the_status_says_how_a_run_ended(config: Config) -> None:
    folder = config.train.output_dir

    def status_after(error: BaseException | None) -> str:
        shape = read_shape(config.model.load)
        with contextlib.suppress(ValueError, RuntimeError), open_run_dir(folder, config, config.model.load, shape):
            assert (folder / "status").read_text() == "running\n"
            if error:
                raise error
        return (folder / "status").read_text()

    assert status_after(ValueError("this is wrong\nand that")) == "failed: this is wrong\n"
    assert status_after(RuntimeError("NCCL")) == "running\n"  # as a crash leaves it
    assert status_after(None) == "running\n"


def test_a_launcher_may_be_there_before_the_run(config: Config) -> None:
    folder = config.train.output_dir
    (folder / "launcher").mkdir(parents=True)
    (folder / "STOP").touch()
    open_and_close(config)
    assert (folder / "launcher").is_dir() and (folder / "STOP").exists()


def test_what_is_refused_can_be_known_before(config: Config, run: Path) -> None:
    before = contents(run)
    shape = read_shape(config.model.load)
    for train, told in (({}, "holds a run already"), ({"resume": True, "save_interval": 1}, None)):
        asked = replace(config, train=replace(config.train, **train))
        with pytest.raises(ValueError, match=told) if told else contextlib.nullcontext():
            check_run_dir(run, asked, config.model.load, shape)
    inside = replace(config, train=replace(config.train, overwrite=True), model=ModelConfig(load=run / "rollouts"))
    with pytest.raises(ValueError, match="is part of the run"):
        check_run_dir(run, inside, config.model.load, shape)
    assert contents(run) == before


def test_the_error_shows_each_and_what_to_type(config: Config, run: Path) -> None:
    other = changed(config, alpha=0.2, temperature=0.7, prompt_template="plain")
    with pytest.raises(ValueError) as error:
        open_and_close(other, resume=True, allow_changed=("temperature",))
    assert str(error.value) == (
        f"--resume would go on with {run} under other settings than it was made with: prompt_template "
        "'qwen25-math-cot' -> 'plain', alpha 0.1 -> 0.2. Take the old ones, say that they are to change "
        "(--allow-changed prompt_template temperature alpha), or begin a run of its own (another --output-dir)"
    )


def test_questions_are_compared_by_content(config: Config, run: Path, tmp_path: Path) -> None:
    moved = shutil.copyfile(config.data.data_path, tmp_path / "moved.jsonl")
    open_and_close(changed(config, data_path=moved), resume=True)
    config.data.data_path.write_text('{"problem": "3+4"}\n')
    with pytest.raises(ValueError, match=r"data_path .*moved\.jsonl \(sha256 \w{8}\) -> .*q\.jsonl \(sha256 \w{8}\)\."):
        open_and_close(config, resume=True)
    open_and_close(config, resume=True, allow_changed=("data_path",))


def test_a_model_is_compared_by_name_and_by_what_is_beside_its_weights(
    config: Config, run: Path, base_model: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(base_model, tmp_path / "other"))
    with pytest.raises(ValueError, match=r"load .*rlsc-tiny-base \(sha256 (\w{8})\) -> .*other \(sha256 \1\)"):
        open_and_close(changed(config, load=other), resume=True)
    open_and_close(changed(config, load=other), resume=True, allow_changed=("load",))
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(ValueError, match=r"load .*other \(sha256 (\w{8})\) -> .*other \(sha256 (?!\1)\w{8}\)"):
        open_and_close(changed(config, load=other), resume=True)


def test_a_replay_asks_no_questions(config: Config, run: Path, tmp_path: Path) -> None:
    """So that their file may be gone."""
    replay = changed(config, replay_rollouts=tmp_path, data_path=tmp_path / "gone.jsonl")
    open_and_close(replay, resume=True, allow_changed=("replay_rollouts",))
    open_and_close(replay, resume=True)


def test_a_run_whose_inputs_are_unknown_is_not_taken_for_the_same(config: Config, run: Path) -> None:
    (run / "inputs.json").unlink()
    with pytest.raises(ValueError, match=r"load .* -> .*, data_path .*--allow-changed load data_path"):
        open_and_close(config, resume=True)


def test_all_else_may_change(config: Config, run: Path) -> None:
    other = replace(
        config,
        parallel=ParallelConfig(tensor_model_parallel_size=2, use_distributed_optimizer=True),
        optimizer=OptimizerConfig(lr=1.0),
        rollout=RolloutConfig(sidecar_port=1, rollout_urls=("http://127.0.0.1:1",), max_logprob_difference=2.0),
    )
    open_and_close(other, resume=True, train_iters=99, save_interval=50)


def test_what_became_of_an_earlier_run_is_not_remembered(config: Config, run: Path) -> None:
    """A run's config.toml is a recipe: it must not delete, or let pass, anything by itself."""
    for flags in ({"resume": True, "allow_changed": ("alpha",)}, {"overwrite": True}):
        open_and_close(config, **flags)
        assert load_recipe(run / "config.toml") == config


# What is deleted


def test_overwrite_deletes_what_a_run_writes(config: Config, run: Path) -> None:
    (run / "thesis.tex").write_text("mine")
    (run / "checkpoints").symlink_to(config.model.load)
    (run / "profile" / "step-000002").mkdir(parents=True)
    open_and_close(config, overwrite=True)
    assert {path.name for path in run.iterdir()} == {"config.toml", "inputs.json", "status", LOCK, "thesis.tex"}
    assert (config.model.load / "config.json").is_file()


def test_overwrite_does_not_delete_what_it_reads(config: Config, run: Path, base_model: Path) -> None:
    shutil.copytree(base_model, run / "hf")
    before = contents(run)
    for name, path in {"load": run / "hf", "replay_rollouts": run / "rollouts"}.items():
        flag = name.replace("_", "-")
        with pytest.raises(
            ValueError, match=rf"--{flag} .* is part of the run that .* holds and that would be deleted"
        ):
            open_and_close(changed(config, **{name: path}), overwrite=True)
    assert contents(run) == before


def test_a_failed_start_is_begun_anew_and_a_checkpoint_is_kept(config: Config) -> None:
    folder = config.train.output_dir
    open_and_close(config)
    (folder / "sidecars").mkdir()
    open_and_close(config)
    assert not (folder / "sidecars").exists()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(ValueError, match="holds a run already"):  # although it has no metrics
        open_and_close(config)


def test_a_folder_that_cannot_be_made_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, reason in ((tmp_path / "file" / "run", "Not a directory"), (Path("/proc/run"), "No such file")):
        with pytest.raises(ValueError, match=rf"--output-dir {folder} cannot be made \({reason}"):
            open_and_close(config, output_dir=folder)


# Room

QWEN_72B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}


def test_a_run_that_will_not_fit_is_refused(config: Config, tmp_path: Path) -> None:
    """72.7e9 parameters, in float32: 12 bytes each in a checkpoint, 4 in an export.

    Five checkpoints in 2000 steps of interval 400 (the last step's is one of them): 5 x 872.5 GB + 290.8 GB = 4.7 TB.
    A machine with that much free disk would have to take a larger model."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_72B))
    shape = read_shape(tmp_path)
    assert shape.num_parameters == 72_706_203_648
    told = (
        r"will write 4\.7 TB: 5 checkpoints of 872\.5 GB and an export of 290\.8 GB\. Make room, save less often than"
    )
    with pytest.raises(ValueError, match=told):
        open_and_close(config, shape=shape, train_iters=2000, save_interval=400)
    assert not config.train.output_dir.exists()
    with pytest.raises(ValueError, match=r"1 checkpoint of 872\.5 GB and an export of .* Make room, or name a folder"):
        open_and_close(config, shape=shape)
