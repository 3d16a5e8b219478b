"""Processes that hang (SIGSTOP) or die (SIGKILL) in each phase of a push, on either side: it ends in bounded time, with
the phase and the replica's name, and the next push is whole.

Under `make test-faults` all phases, here some of those whose waiting differs. Not covered: a network that is cut.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from processes import processes
from pushing import build_sync, difference
from safetensors.torch import save_file
from served_tiny import MAX_MODEL_LEN, TinyModel

from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.wire import bearer

SECONDS = 3.0
"""The time-out of every phase here."""
REQUESTS = {
    "init": lambda path, body: path == "/init_weight_transfer_engine",
    "pause": lambda path, body: path == "/pause",
    "start": lambda path, body: path == "/start_weight_update",
    "transfer": lambda path, body: path == "/update_weights" and b'"checksum"' in body,
    "finish": lambda path, body: path == "/finish_weight_update",
    "verify": lambda path, body: path == "/collective_rpc" and b"live_checksums" in body,
    "resume": lambda path, body: path == "/resume",
}
"""What is on its way when a phase begins."""


class At(httpx.HTTPTransport):
    """The network, but that something happens as a phase begins."""

    def __init__(self, phase: str, happens: Callable[[], None]) -> None:
        super().__init__()
        self._is_meant, self._happens = REQUESTS[phase], happens

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self._is_meant(request.url.path, request.read()):
            self._happens()
        return super().handle_request(request)


def tree_of(sidecar: Sidecar, *, but: tuple[str, ...] = ("keeper",)) -> list[int]:
    return [pid for name, pid in processes(sidecar).items() if name not in but]


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def assert_a_whole_push_works(sidecar: Sidecar, tiny: TinyModel, transport: str) -> None:
    tiny.step()
    sync = build_sync(sidecar, tiny, transport=transport)
    assert difference(tiny, sync, sync.push(tiny.weights().items())) < 1e-3
    sync.close()


def cases(common: set[tuple[str, str]]) -> pytest.MarkDecorator:
    """(transport, phase): every one; those that are not common are for `make test-faults`."""
    every = [(transport, phase) for transport in ("file", "gloo") for phase in REQUESTS]
    marks = [() if case in common else (pytest.mark.faults,) for case in every]
    return pytest.mark.parametrize(
        ("transport", "phase"), [pytest.param(*case, marks=mark) for case, mark in zip(every, marks)]
    )


@cases({("file", "start"), ("file", "verify"), ("gloo", "init"), ("gloo", "transfer")})
def test_a_sidecar_that_hangs(sidecar: Sidecar, tiny: TinyModel, transport: str, phase: str) -> None:
    pids = tree_of(sidecar)
    hook = At(phase, lambda: signal_all(pids, signal.SIGSTOP))
    sync = build_sync(sidecar, tiny, transport=transport, timeout=SECONDS, http_transport=hook)
    (replica,) = sync._fleet.replicas
    begun = time.monotonic()
    try:
        sync.push(tiny.weights().items())
        assert time.monotonic() - begun < 5 * SECONDS
    finally:
        signal_all(pids, signal.SIGCONT)
    assert (replica.state, replica.version) == ("away", "")
    assert replica.reason.startswith(f"{phase}: ") and f"replica 0 ({sidecar.url})" in replica.reason
    wait_until_it_answers(sidecar)
    assert_a_whole_push_works(sidecar, tiny, transport)


def wait_until_it_answers(sidecar: Sidecar) -> None:
    """And has done with what was asked of it while it stood still."""
    body = {"method": "describe_transfer"}
    httpx.post(f"{sidecar.url}/collective_rpc", headers=bearer(sidecar.key), json=body, timeout=30)
    time.sleep(1)


TRAINER = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from safetensors.torch import load_file
import test_push_faults as faults
from pushing import specs_of
from megatron_rlsc.rollout import link, transport, weight_sync
from megatron_rlsc.rollout.fleet import Fleet, Replica

url, key, weights, way, phase, number = sys.argv[1:]

def happen(*_, **__):
    time.sleep(0.3)  # what was asked is under way
    os.kill(os.getpid(), int(number))

hook = None
if phase == "transfer":
    transport.FileChannel.send = transport.GroupChannel.send = happen
elif phase == "init" and way == "gloo":
    link.open_group = happen
else:
    hook = faults.At(phase, happen)
tensors = load_file(weights)
fleet = Fleet([Replica(index=0, url=url, key=key)])
sync = weight_sync.WeightSync(
    fleet, specs=specs_of(tensors), transport=way, timeout=faults.SECONDS, http_transport=hook
)
sync.push(tensors.items())
"""


@contextmanager
def trainer(
    sidecar: Sidecar, tiny: TinyModel, tmp_path: Path, transport: str, phase: str, number: int
) -> Iterator[subprocess.Popen[bytes]]:
    """One that does not get beyond the phase."""
    save_file({name: value + 1 for name, value in tiny.weights().items()}, tmp_path / "weights.safetensors")
    code = TRAINER.format(tests=str(Path(__file__).parent))
    words = [sidecar.url, sidecar.key, tmp_path / "weights.safetensors", transport, phase, number]
    with subprocess.Popen([sys.executable, "-c", code, *map(str, words)]) as process:
        try:
            yield process
        finally:
            process.kill()


@cases({("file", "transfer"), ("gloo", "init"), ("gloo", "transfer")})
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_a_trainer_that_hangs_or_dies(
    sidecar: Sidecar, tiny: TinyModel, tmp_path: Path, transport: str, phase: str, number: int
) -> None:
    """The next trainer has the sidecar after what its workers wait at most. A stopped one sends nothing any more."""
    with trainer(sidecar, tiny, tmp_path, transport, phase, number) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) or os.WIFSIGNALED(status), "it got beyond the phase"
        process.returncode = None if os.WIFSTOPPED(status) else -number
        begun = time.monotonic()
        assert_a_whole_push_works(sidecar, tiny, transport)
        assert time.monotonic() - begun < 5 * SECONDS


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["file", "gloo"])
@pytest.mark.parametrize("phase", REQUESTS)
def test_an_engine_that_dies(sidecar_python: Path, tiny: TinyModel, tmp_path: Path, transport: str, phase: str) -> None:
    with Sidecar(
        sidecar_python,
        tiny.folder,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        seed=1,
        log_path=tmp_path / "vllm.log",
        timeout=600,
    ) as mortal:
        mortal.wait_until_ready()
        engines = tree_of(mortal, but=("keeper", "server"))
        hook = At(phase, lambda: signal_all(engines, signal.SIGKILL))
        sync = build_sync(mortal, tiny, transport=transport, timeout=SECONDS, http_transport=hook)
        (replica,) = sync._fleet.replicas
        begun = time.monotonic()
        sync.push(tiny.weights().items())
        assert time.monotonic() - begun < 5 * SECONDS
        assert replica.version == "" and replica.reason.startswith(f"{phase}: ")
