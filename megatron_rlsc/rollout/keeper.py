"""Runs one command, and lets nothing of it outlive us or our parent: `python keeper.py PARENT_PID RUN_DIR COMMAND...`.

vLLM is a tree of processes that survives the death of its root, and a trainer killed with SIGKILL cleans up nothing.
So the trainer starts this file (standard library only, no imports of ours), and this file starts the tree, in a
session of its own. Whichever ends first - the trainer, the command, or us by SIGTERM - the whole session is killed and
the run directory removed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

KEEPER_VARIABLE = "RLSC_KEEPER_PID"
GRACE_SECONDS = 10.0
"""From SIGTERM, on which vLLM unlinks its shared memory, to SIGKILL."""

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """SIGTERM to this process when its parent, process `parent`, dies; at once if it already has. Linux only.

    The kernel ties this to the parent's *thread* that started us, so a trainer starts its sidecar on its main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def follow_keeper() -> None:
    """In the kept command: SIGTERM when the keeper itself is killed. Nothing where no keeper started it."""
    if keeper := os.environ.get(KEEPER_VARIABLE):
        die_with(int(keeper))


def keep(parent: int, run_dir: Path, command: list[str]) -> int:
    """Runs `command` to its end or ours, and returns its exit status, negative for a signal."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)
    try:
        die_with(parent)
        environment = {**os.environ, KEEPER_VARIABLE: str(os.getpid())}
        child = subprocess.Popen(command, start_new_session=True, env=environment)
        try:
            return child.wait()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _end_session(child)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def _end_session(leader: subprocess.Popen[bytes]) -> None:
    leader.terminate()
    try:
        leader.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"keeper: no end within {GRACE_SECONDS} s of SIGTERM, killing", file=sys.stderr)
    try:
        os.killpg(leader.pid, signal.SIGKILL)  # pid is the group's: the leader began its session
    except ProcessLookupError:
        return  # nothing was left of it
    leader.wait()


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
