"""What a user got wrong is said in one paragraph, with the remedy, before anything is trained or written.

Not covered: the same mistakes under torchrun, where the paragraph also stands in the table that torchrun ends with.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from megatron_rlsc.__main__ import main
from megatron_rlsc.conversion.shape import read_shape
from megatron_rlsc.recipe import parse_config
from megatron_rlsc.run_folder.folder import open_run_dir

NO_VLLM = sys.executable


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"problem": "1+2"}\n')
    return path


def error_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **flags: object) -> str:
    """What `python -m megatron_rlsc` says, having ended with 2; on one line, however it was broken."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    words = [name if value is True else f"{name}={value}" for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", ["rlsc", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path, questions, base_model, sidecar_python):
    """error_of a run that is sound but for the flags given; nothing may have been written."""

    def check(**flags: object) -> str:
        output = tmp_path / "run"
        sound = {"load": base_model, "data_path": questions, "output_dir": output, "max_response_length": 32}
        message = error_of(capsys, monkeypatch, **(sound | {"sidecar_python": sidecar_python} | flags))
        assert not output.exists()
        assert "Traceback" not in message, message
        return message

    return check


def copy_of(base_model: Path, folder: Path) -> Path:
    shutil.copytree(base_model, folder)
    return folder


def test_models(refused, base_model, tmp_path):
    assert f"there is no model at {tmp_path / 'absent'}" in refused(load=tmp_path / "absent")

    other = copy_of(base_model, tmp_path / "llama")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "model_type is 'llama'; this package trains qwen2" in refused(load=other)

    bare = copy_of(base_model, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert str(bare) in refused(load=bare)

    cut = copy_of(base_model, tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors" in refused(load=cut)

    shards = copy_of(base_model, tmp_path / "shards")
    (shards / "model.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    files = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert "shards lacks 1 of the 2 shards" in refused(load=shards)


def test_layouts(refused):
    message = refused(tensor_model_parallel_size=3)
    assert "3 does not fit 4 attention heads, 2 KV heads and an MLP of 256: 1, 2, 4 do" in message
    assert "2 ranks do not divide the world of 1" in refused(pipeline_model_parallel_size=2)


def test_prompts(refused, questions, tmp_path):
    assert "there is no prompt file" in refused(data_path=tmp_path / "absent.jsonl")
    for content, told in [
        ("", "has no questions"),
        ('{"problem": "1+1"}\nnonsense\n', "line 2: not JSON"),
        ('{"problem": "1+1"}\n{"text": "2+2"}\n', "line 2: neither `problem` nor `question`"),
        ('{"problem": "1+1"}\n{"problem": "2+2"}\n{"problem": "1+1 "}\n', "1 of 3 questions are there already"),
        (json.dumps({"problem": "9" * 5000}), "line 1: the prompt has 5"),
    ]:
        questions.write_text(content)
        assert told in refused()
    questions.write_text('{"problem": "1+2"}\n')
    assert "the model's context leaves" in refused(max_response_length=4096)


def test_vocabularies(refused, base_model, tmp_path):
    def change(folder: Path, name: str, **fields: object) -> Path:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | fields))
        return folder

    none = copy_of(base_model, tmp_path / "none")
    (none / "tokenizer.json").unlink()
    assert "none has no tokenizer: neither tokenizer.json" in refused(load=none)

    other = change(copy_of(base_model, tmp_path / "other"), "tokenizer.json")
    added = json.loads((other / "tokenizer.json").read_text())["added_tokens"]
    change(other, "tokenizer.json", added_tokens=[*added, added[-1] | {"id": 300, "content": "<|other|>"}])
    assert "the tokenizer has token ids up to 259, the model only 259 rows" in refused(load=other)

    stops = change(copy_of(base_model, tmp_path / "stops"), "generation_config.json", eos_token_id=[256, 151645])
    assert "no response could end with stop token 151645" in refused(load=stops)


def test_sidecars(refused, tmp_path):
    assert "bash tools/setup_env.sh" in refused(sidecar_python=NO_VLLM)
    assert "bash tools/setup_env.sh" in refused(sidecar_python=tmp_path / "no-python")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in refused(sidecar_port=port)


def test_journals(refused, tmp_path):
    assert "has no step-000001.jsonl to replay" in refused(replay_rollouts=tmp_path)
    (line, *_) = (Path(__file__).parent / "golden/journal/step-000001.jsonl").read_text().splitlines()
    (tmp_path / "step-000001.jsonl").write_text(json.dumps(json.loads(line) | {"prompt_token_ids": [151644]}))
    message = refused(replay_rollouts=tmp_path, train_iters=1)
    assert "step-000001.jsonl has token id 151644, the model only 259 rows" in message


def test_values(refused):
    assert "top_p=0.9 is refused in training" in refused(top_p=0.9)
    assert "is neither qwen25-math-cot nor plain" in refused(prompt_template="Solve this:")
    assert "Unrecognized options: --max-respons-length=5" in refused(max_respons_length=5)


def test_an_output_folder_in_use_is_left_alone(capsys, monkeypatch, tmp_path, questions, base_model, sidecar_python):
    sound = {"load": base_model, "data_path": questions, "max_response_length": 32, "sidecar_python": sidecar_python}
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    assert "holds something that is no run" in error_of(capsys, monkeypatch, output_dir=run, **sound)
    (run / "config.toml").write_text("")
    (run / "metrics.jsonl").write_text("{}\n")
    assert "--resume goes on with it, --overwrite deletes it" in error_of(capsys, monkeypatch, output_dir=run, **sound)
    assert (run / "thesis.tex").read_text() == "mine"


def test_a_run_folder_is_one_live_run_s_and_keeps_its_settings(
    capsys, monkeypatch, tmp_path, questions, base_model, sidecar_python
):
    sound = {"load": base_model, "data_path": questions, "max_response_length": 32, "sidecar_python": sidecar_python}
    run = sound | {"output_dir": tmp_path / "run"}
    config = parse_config([f"--{name.replace('_', '-')}={value}" for name, value in run.items()])
    with open_run_dir(config.train.output_dir, config, base_model, read_shape(base_model)):
        for what in ({}, {"resume": True}, {"overwrite": True}):
            message = error_of(capsys, monkeypatch, **run, **what)
            assert f"belongs to a run that is alive, process {os.getpid()} on " in message
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    message = error_of(capsys, monkeypatch, **run, resume=True, alpha=0.2, temperature=0.7)
    assert (
        ": temperature 0.5 -> 0.7, alpha 0.1 -> 0.2. Take the old ones, say that they are to change (--all" in message
    )
    questions.write_text('{"problem": "3+4"}\n')
    message = error_of(capsys, monkeypatch, **run, resume=True, alpha=0.2, allow_changed="alpha")
    assert "data_path" in message and "alpha 0.1" not in message


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    """A mistake of ours is not dressed up as the user's."""
    monkeypatch.setattr(sys, "argv", ["rlsc", "--config=/dev/null/recipe.toml"])
    with pytest.raises(NotADirectoryError):
        main()
