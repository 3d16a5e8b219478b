"""tools/convert_hf.py as processes: killed, stopped, interrupted, two at once, and what they say and exit with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TinyModel, save_tiny
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/convert_hf.py"
ROWS = 3_000_000
"""Of a vocabulary that takes a second to write: time enough to stop and kill."""


def command(*words: object) -> list[str]:
    return [sys.executable, str(TOOL), *map(str, words)]


def run(*words: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """0.4 GB, nearly all of it embedding."""
    model = save_tiny(tmp_path_factory.mktemp("large") / "hf", tied=True)
    model.state["model.embed_tokens.weight"] = torch.ones(ROWS, 32)
    save_file(model.state, model.hf_dir / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model.hf_dir / "config.json").read_text())
    (model.hf_dir / "config.json").write_text(json.dumps({**config, "vocab_size": ROWS}))
    return model


@pytest.fixture
def stopped(large: TinyModel, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A conversion to `m` that was stopped (SIGSTOP) when it had written something."""
    words = command("to-megatron", "--hf-dir", large.hf_dir, "--megatron-dir", tmp_path / "m", "--workers", 1)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        archive = tmp_path / ".m.partial/release/__0_0.distcp"
        while process.poll() is None and not (archive.exists() and archive.stat().st_size):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None and not (tmp_path / "m").exists(), "it was done before it could be stopped"
        yield process
        process.kill()


def test_a_killed_run_leaves_nothing_that_looks_finished(stopped, large, tmp_path):
    stopped.kill()
    stopped.wait()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [".m.lock", ".m.partial"]
    looked = run("inspect", tmp_path / "m")
    assert looked.returncode == 1 and ".m.partial is an interrupted conversion, to be started again" in looked.stderr
    again = run("to-megatron", "--hf-dir", large.hf_dir, "--megatron-dir", tmp_path / "m")
    assert again.returncode == 0, again.stderr
    assert ".m.partial is what an interrupted run left: it is removed, and this one begins anew" in again.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert run("inspect", tmp_path / "m", "--checksums").returncode == 0


def test_an_interrupted_run_cleans_up_behind_itself(stopped, tmp_path):
    stopped.send_signal(signal.SIGINT)
    stopped.send_signal(signal.SIGCONT)
    stopped.communicate(timeout=60)
    assert stopped.returncode not in (0, None)
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_meet(stopped, large, tmp_path):
    second = run("to-megatron", "--hf-dir", large.hf_dir, "--megatron-dir", tmp_path / "m")
    told = f"{tmp_path / 'm'} is being written by process {stopped.pid} on {socket.gethostname()}: wait for it"
    assert second.returncode == 1 and told in second.stderr
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(timeout=60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert run("inspect", tmp_path / "m", "--checksums").returncode == 0


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL])
def test_a_second_job_with_the_model_waits_for_the_first(stopped, large, tmp_path, end):
    """And writes it itself where the first does not live to."""
    sides = ("--hf-dir", large.hf_dir, "--megatron-dir", tmp_path / "m")
    words = command("to-megatron", "--keep", *sides)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as second:
        said = [second.stdout.readline() for _ in range(4)]
        told = f"{tmp_path / 'm'} is being written by process {stopped.pid} on {socket.gethostname()}: wait for it"
        assert any(told in line for line in said), said
        stopped.send_signal(end)
        rest, _ = second.communicate(timeout=120)
    assert second.returncode == 0, rest
    assert ("m is there already, a Megatron checkpoint of" in rest) == (end == signal.SIGCONT)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert run("inspect", tmp_path / "m", "--checksums").returncode == 0


def test_what_is_kept_is_of_the_model(untied, tmp_path):
    sides = ("--hf-dir", untied.hf_dir, "--megatron-dir", tmp_path / "m")
    for told in ("is a Megatron checkpoint of", "is there already"):
        kept = run("to-megatron", "--keep", *sides)
        assert kept.returncode == 0 and f"{tmp_path / 'm'} {told}" in kept.stdout, kept.stderr
    last = max(name for name in untied.state if name.endswith("k_proj.bias"))
    untied.state[last][3] += 1
    save_file(untied.state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    other = run("to-megatron", "--keep", *sides)
    assert other.returncode == 1
    assert f"{tmp_path / 'm'} is of another model than {untied.hf_dir}, by {last}: convert it into" in other.stderr
    assert run("to-megatron", "--keep", "--overwrite", *sides).returncode == 1


def test_exit_codes_of_verify(untied, tmp_path):
    sides = ("--hf-dir", untied.hf_dir, "--megatron-dir", tmp_path / "m")
    run("to-megatron", *sides, check=True)
    same = run("verify", *sides)
    assert same.returncode == 0 and same.stdout.endswith("the same model\n")
    untied.state["model.norm.weight"][3] += 1
    save_file(untied.state, untied.hf_dir / "model.safetensors", metadata={"format": "pt"})
    other = run("verify", *sides)
    assert other.returncode == 3
    assert "model.norm.weight: 1 of 32 numbers differ" in other.stdout and "NOT the same model" in other.stdout
    assert run("verify", "--hf-dir", tmp_path, "--megatron-dir", tmp_path / "m").returncode == 1


def test_a_folder_that_may_not_be_written_or_read(base_model):
    """As another user than root, whom nothing stops."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        program = (
            "import os, sys; from pathlib import Path; import torch; from megatron_rlsc.conversion.convert import *\n"
            "source, target = map(Path, sys.argv[1:])\n"
            "plan = plan_megatron(source, target, dtype=None, overwrite=False)\n"
            "os.getuid() or os.seteuid(65534)\n"
            "try: convert(plan)\n"
            "except ValueError as error: print(error)\n"
        )
        words = [sys.executable, "-c", program, str(base_model), f"{folder}/deep/m"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert "Permission denied: change its permissions, or name another folder" in done.stdout, done.stderr
        assert os.listdir(folder) == []
