"""The sidecar's life: what stops it from starting, and what becomes of it when the trainer is killed.

Not covered: GPUs. Several replicas, and sidecars that hang or die while they are needed, are test_faults.py's.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from processes import descendants, is_running, shared_memory
from served_tiny import MAX_MODEL_LEN, PROMPTS, YARN, TinyModel, build_client, build_tiny

from megatron_rlsc.rollout.fleet import Fleet, Replica
from megatron_rlsc.rollout.sidecar import Sidecar, SidecarError, core_shares
from megatron_rlsc.rollout.weight_sync import WeightSync


def build_sidecar(
    python: Path, model_dir: Path, tmp_path: Path, *, port: int = 0, timeout: float = 600, kv_cache_gib: int = 1
) -> Sidecar:
    return Sidecar(
        python,
        model_dir,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        seed=1,
        log_path=tmp_path / "logs" / "vllm.log",
        port=port,
        kv_cache_gib=kv_cache_gib,
        timeout=timeout,
    )


def test_an_environment_without_vllm_is_named_with_the_remedy(tmp_path: Path) -> None:
    """The trainer's own environment is one."""
    with pytest.raises(SidecarError, match=r"has no vLLM: `bash tools/setup_env\.sh`"):
        build_sidecar(Path(sys.executable), tmp_path, tmp_path).start()
    assert list(tmp_path.iterdir()) == []  # not even a log


def test_a_missing_python_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(SidecarError, match=r"no Python at .*/nowhere \(No such file.*setup_env\.sh"):
        build_sidecar(tmp_path / "nowhere", tmp_path, tmp_path).start()


def test_a_port_in_use_is_named(sidecar_python: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SidecarError, match=rf"port {port} of 127\.0\.0\.1: Address already in use"):
            build_sidecar(sidecar_python, tmp_path, tmp_path, port=port).start()


def test_nobody_gets_the_port_before_vllm_listens(sidecar_python: Path, tmp_path: Path) -> None:
    """Which takes it many seconds after it was chosen."""
    with build_sidecar(sidecar_python, tmp_path, tmp_path) as sidecar, socket.socket() as stranger:
        port = httpx.URL(sidecar.url).port
        assert port
        with pytest.raises(OSError, match="Address already in use"):
            stranger.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)):
        pass  # free again


def test_a_sidecar_that_dies_at_the_start_shows_its_last_words(sidecar_python: Path, tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    (model_dir / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such_model"}')
    with build_sidecar(sidecar_python, model_dir, tmp_path) as sidecar:
        run_dir = sidecar.run_dir
        with pytest.raises(SidecarError, match=r"(?s)ended with status 1. The end of .*vllm\.log:.*no_such_model"):
            sidecar.wait_until_ready()
    assert run_dir and not run_dir.exists()


def test_a_failure_inside_the_engine_is_shown_too(sidecar_python: Path, tiny: TinyModel, tmp_path: Path) -> None:
    """vLLM's last word is then only that its engine failed, after a hundred lines of tracebacks. Here it is for want of
    memory, so the flags that decide on it are named too."""
    with build_sidecar(sidecar_python, tiny.folder, tmp_path, kv_cache_gib=1 << 20) as sidecar:
        cause = r"ended with status 1.*requested memory.*1048576\.0 GiB.*--sidecar-kv-cache-gib"
        with pytest.raises(SidecarError, match=f"(?s){cause}"):
            sidecar.wait_until_ready()


def test_a_sidecar_that_is_not_ready_in_time_is_given_up(sidecar_python: Path, tmp_path: Path) -> None:
    with build_sidecar(sidecar_python, tmp_path, tmp_path, timeout=0.5) as sidecar:
        run_dir = sidecar.run_dir
        assert run_dir and run_dir.stat().st_mode & 0o777 == 0o700
        with pytest.raises(SidecarError, match=r"generated nothing within 0\.5 s"):
            sidecar.wait_until_ready()
    assert not run_dir.exists()


TRAINER = """
import sys, time
from pathlib import Path
from megatron_rlsc.rollout.sidecar import Sidecar
python, model_dir, log_path, max_model_len = sys.argv[1:]
sidecar = Sidecar(Path(python), Path(model_dir), dtype="float32", max_model_len=int(max_model_len), seed=1,
                  log_path=Path(log_path), timeout=600)
sidecar.start()
sidecar.wait_until_ready()
print(sidecar.url, sidecar.key, sidecar.run_dir, flush=True)
time.sleep(300)
"""


def test_a_killed_trainer_leaves_nothing_behind(
    sidecar_python: Path, cluster_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trainer is another process, its model is untied and has YaRN, and it is killed with responses in flight.

    There is no home, and proxies that answer nothing claim every request, those of the client in this process too."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in cluster_environment.items():
        monkeypatch.setenv(name, value)
    tiny = build_tiny(tmp_path / "model", tied=False, rope_parameters=YARN)
    command = [sys.executable, "-c", TRAINER, sidecar_python, tiny.folder, tmp_path / "vllm.log", MAX_MODEL_LEN]
    trainer = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    url, key, run_dir = trainer.stdout.readline().split()

    fleet = Fleet([Replica(index=0, url=url, key=key)])
    sync = WeightSync(fleet, specs=tiny.specs(), timeout=300)
    for _ in range(2):
        version = sync.push(tiny.weights().items())
        samples = build_client(url, key).generate(PROMPTS, step=0, version=version)
        assert tiny.largest_difference(samples) < 1e-4
        tiny.step()

    tree = descendants(trainer.pid)
    assert len(tree) >= 3  # keeper, API server, engine
    left_behind = {Path(run_dir), *shared_memory(tree)}
    assert len(left_behind) > 1
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while left := [pid for pid in tree if is_running(pid)]:
        assert time.monotonic() < deadline, f"{left} of {tree} outlived the trainer"
        time.sleep(0.1)
    assert [path for path in left_behind if path.exists()] == []


@pytest.mark.parametrize(
    ("replicas", "tensor_parallel_size", "shares"),
    [
        (1, 1, [""]),  # vLLM's own choice, which knows NUMA nodes
        (1, 2, [""]),
        (2, 1, ["0,1", "2,3"]),
        (2, 2, ["0|1", "2|3"]),
        (3, 1, ["0", "1", "2"]),
        (5, 1, [""] * 5),
    ],
)
def test_replicas_on_cpus_have_cores_of_their_own(
    monkeypatch: pytest.MonkeyPatch, replicas: int, tensor_parallel_size: int, shares: list[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 1, 0, 2})
    assert core_shares(replicas, tensor_parallel_size) == shares
