"""Nothing outlives its trainer, with shells in place of vLLM: parent killed, root killed, orphans, deaf processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from megatron_rlsc.rollout import keeper

TREE = """
import signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)", sys.argv[1]])
time.sleep(300)
"""
"""A root and a child that never end by themselves, with a marker on their command lines to count them by."""

OWNER = """
import mmap, time
file = open("/dev/shm/NAME", "r+b")
segment = mmap.mmap(file.fileno(), 4096)
print("up", flush=True)
time.sleep(300)
"""

PARENT = """
import os, signal, subprocess, sys
signal.signal(signal.SIGUSR1, lambda number, frame: 1 / 0)
subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]]).wait()
"""


def processes_of(marker: str) -> list[int]:
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in command_line.read_bytes():
                found.append(int(command_line.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return found


def assert_gone(marker: str, run_dir: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := processes_of(marker)) or run_dir.exists():
        assert time.monotonic() < deadline, f"still there: {left}, {run_dir} {run_dir.exists()}"
        time.sleep(0.05)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "file").touch()
    return directory


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[str]:
    """On the command line of every process of a test, and of no other."""
    yield str(tmp_path)
    for process in processes_of(str(tmp_path)):
        os.kill(process, signal.SIGKILL)


def start(run_dir: Path, *command: str) -> tuple[subprocess.Popen[str], int]:
    """A stand-in for the trainer, and the keeper's pid, once the tree is up."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, keeper.__file__, str(run_dir), *command], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    return parent, int(child)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_parent_that_ends_takes_all_with_it(run_dir: Path, marker: str, way: signal.Signals) -> None:
    """Killed, told to, interrupted, hung up; or by an exception (which SIGUSR1 raises in it)."""
    parent, _ = start(run_dir, sys.executable, "-c", TREE, marker)
    assert len(processes_of(marker)) == 4  # parent, keeper, root, child
    parent.send_signal(way)
    assert parent.wait(5) != 0
    assert_gone(marker, run_dir, seconds=5)


def test_a_killed_root_takes_all_with_it(run_dir: Path, marker: str) -> None:
    """As when the kernel's out-of-memory killer takes vLLM's API server and leaves its engine."""
    parent, keeper_pid = start(run_dir, sys.executable, "-c", TREE, marker)
    (root,) = Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children").read_text().split()
    os.kill(int(root), signal.SIGKILL)
    parent.wait(5)
    assert_gone(marker, run_dir, seconds=5)


def test_the_deaf_are_killed(run_dir: Path, marker: str) -> None:
    parent, keeper_pid = start(run_dir, sys.executable, "-c", TREE, marker, "deaf")
    os.kill(keeper_pid, signal.SIGTERM)
    parent.wait(keeper.GRACE_SECONDS + 5)
    assert_gone(marker, run_dir, seconds=1)


def test_what_a_killed_keeper_leaves_is_found_and_killed(run_dir: Path, marker: str) -> None:
    folder = f"TMPDIR={run_dir}/tmp"
    parent, keeper_pid = start(run_dir, "env", folder, sys.executable, "-c", TREE, marker, "deaf")
    os.kill(keeper_pid, signal.SIGKILL)
    parent.wait(5)
    assert len(processes_of(marker)) == 2  # root and child: deaf, and not vLLM, which would follow
    assert keeper.kill_orphans(run_dir)
    deadline = time.monotonic() + 5
    while keeper.kill_orphans(run_dir):
        assert time.monotonic() < deadline
    assert processes_of(marker) == []


def test_shared_memory_that_a_process_could_not_unlink_is_removed(run_dir: Path, marker: str) -> None:
    held = SharedMemory(create=True, size=4096)
    owner = OWNER.replace("NAME", held.name)
    parent, _ = start(run_dir, sys.executable, "-c", owner, marker)
    parent.kill()
    parent.wait()
    assert_gone(marker, run_dir, seconds=5)
    assert not Path("/dev/shm", held.name).exists()
    held.close()


def test_shared_memory_of_a_process_that_was_killed_before_is_removed(run_dir: Path, marker: str) -> None:
    """As when vLLM's engine is killed, and its server ends in order after it."""
    held = SharedMemory(create=True, size=4096)
    owner = f"[sys.executable, '-c', {OWNER.replace('NAME', held.name)!r}, {marker!r}]"
    tree = f"import subprocess, sys, time\nsubprocess.Popen({owner})\ntime.sleep(300)"
    parent, keeper_pid = start(run_dir, sys.executable, "-c", tree, marker)
    time.sleep(3)  # the keeper looks every 2
    (root,) = map(int, Path(f"/proc/{keeper_pid}/task/{keeper_pid}/children").read_text().split())
    (owner_pid,) = map(int, Path(f"/proc/{root}/task/{root}/children").read_text().split())
    os.kill(owner_pid, signal.SIGKILL)
    os.kill(root, signal.SIGTERM)
    parent.wait(5)
    assert_gone(marker, run_dir, seconds=5)
    assert not Path("/dev/shm", held.name).exists()
    held.close()


def test_the_status_is_the_commands(run_dir: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    kept = subprocess.run([sys.executable, "-I", keeper.__file__, str(os.getpid()), str(run_dir), *command])
    assert kept.returncode == 7
    assert not run_dir.exists()
