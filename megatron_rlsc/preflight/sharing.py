"""Is the output folder one folder on all nodes, whose file system has what a run counts on: renaming, and locks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from megatron_rlsc.disk import write_whole
from megatron_rlsc.lock import NO_LOCKS
from megatron_rlsc.preflight.finding import Finding, ok, placed, warning
from megatron_rlsc.preflight.site import Site
from megatron_rlsc.run_folder.names import LAUNCHER

PREFIX = ".preflight-"
SEEN_SECONDS = 10.0
"""Until a file that one node has written is there on another: NFS looks again after some seconds."""
MEET_SECONDS = SEEN_SECONDS + 20
RENAMES = 200
"""Of one file, while another node reads it."""
HELD = "held"


def check_sharing(at: Site) -> Finding:
    """Every rank sees what rank 0 has written, and rank 0 what each of them has; a file that is replaced is always
    there, whole; a lock that one node holds, the others do not get."""
    ranks, folder = at.ranks, at.config.train.output_dir.absolute()
    # What is killed here leaves its files behind: where no run takes them for somebody else's.
    place = folder / LAUNCHER if folder.exists() else next(above for above in folder.parents if above.exists())
    probe = Path(ranks.exchange("sharing", str(place / f"{PREFIX}{secrets.token_hex(8)}"), seconds=MEET_SECONDS)[0])
    made = not place.exists()
    try:
        return _look(at, probe)
    finally:
        if ranks.rank == 0:
            shutil.rmtree(probe, ignore_errors=True)
            with contextlib.suppress(OSError):  # somebody has put something there
                if made:
                    place.rmdir()


def _look(at: Site, probe: Path) -> Finding:
    ranks = at.ranks
    failed = ""
    try:
        if ranks.rank == 0:
            probe.mkdir(parents=True)
            write_whole(probe / "0", b"0")
    except OSError as error:
        failed = f"{error.filename} cannot be written ({error.strerror}): name another --output-dir"
    if failed := ranks.exchange("sharing", failed, seconds=MEET_SECONDS)[0]:
        raise ValueError(failed)

    seen = _comes_true(lambda: (probe / "0").is_file())
    if seen and ranks.rank:
        with contextlib.suppress(OSError):  # rank 0 will miss it
            write_whole(probe / str(ranks.rank), b"0")
    blind = [rank for rank, sees in enumerate(ranks.exchange("sharing", seen, seconds=MEET_SECONDS)) if not sees]
    names = {str(rank) for rank in range(ranks.size) if rank not in blind}
    there = _comes_true(lambda: names <= {path.name for path in probe.iterdir()}) if ranks.rank == 0 else True
    unseen = sorted(int(name) for name in names - {path.name for path in probe.iterdir()}) if not there else []
    unseen = ranks.exchange("sharing", unseen, seconds=MEET_SECONDS)[0]
    if blind or unseen:
        said = [f"{placed(blind, ranks.hosts)} cannot see what rank 0 writes there"] if blind else []
        said += [f"rank 0 cannot see what {placed(unseen, ranks.hosts)} wrote there"] if unseen else []
        raise ValueError(
            f"--output-dir {at.config.train.output_dir} is not on one file system for all nodes: {'; '.join(said)}. "
            f"Name a folder that they share, and not /tmp"
        )
    return _judge(at, probe)


def _judge(at: Site, probe: Path) -> Finding:
    """Rank 0 writes and locks; a rank on another node, where there is one, looks on."""
    ranks = at.ranks
    onlooker = next((rank for rank, host in enumerate(ranks.hosts) if host != ranks.hosts[0]), ranks.size - 1)
    moving, held = probe / "moving", probe / HELD
    if ranks.rank == 0:
        write_whole(moving, b"0" * 100)
    ranks.exchange("sharing", None, seconds=MEET_SECONDS)
    torn = ""
    if ranks.rank == 0:
        for turn in range(RENAMES):
            write_whole(moving, str(turn % 10).encode() * 100)
        (probe / "renamed").touch()
    if ranks.rank == onlooker and onlooker:
        torn = _watch(moving, probe / "renamed")
    torn = ranks.exchange("sharing", torn, seconds=MEET_SECONDS)[onlooker]

    lock, second = "", ""
    with contextlib.ExitStack() as stack:
        if ranks.rank == 0:
            lock = _lock(held, stack)
        lock = ranks.exchange("sharing", lock, seconds=MEET_SECONDS)[0]
        if ranks.rank == onlooker:
            second = _lock(held, stack)
        second = ranks.exchange("sharing", second, seconds=MEET_SECONDS)[onlooker]
    where = "between nodes" if ranks.hosts[onlooker] != ranks.hosts[0] else "on this node"
    faults = [f"a file that is replaced {torn}: status and checkpoints may be read half-written"] if torn else []
    if lock or second != HELD:
        faults.append(
            f"locks do not hold ({lock or second or 'two nodes got one'}): let no two runs write to one folder"
        )
    if faults:
        return warning(f"{where}: {'; '.join(faults)}")
    return ok(f"{where}: files seen by all, renamed as a whole, locked")


def _comes_true(look: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SEEN_SECONDS
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _watch(moving: Path, end: Path) -> str:
    """What was wrong with a file that another node replaces, over and over until `end` is there; empty: nothing."""
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        over = end.exists()
        try:
            content = moving.read_bytes()
        except OSError as error:
            return f"was not there for a moment ({error.strerror})"
        if len(content) != 100 or len(set(content)) != 1:
            return f"was half there ({len(content)} of 100 bytes)"
        if over:
            return ""
    return ""


def _lock(path: Path, stack: contextlib.ExitStack) -> str:
    """Empty where the lock was had, and is held until the stack ends; `held` where somebody has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return HELD
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return str(error.strerror)
    return ""
