"""tools/preflight.py as tests start it: one process a rank, on this machine or on emulated nodes of it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "preflight.py"
SECONDS = 150
"""For a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A rank that has ended."""

    code: int
    out: str
    err: str

    def row(self, name: str) -> str:
        """A row of the table on one line, with its mark: `✓ layout TP 1 x PP 1 x DP 2 on 2 ranks`."""
        lines, found = self.out.splitlines(), []
        for line in lines:
            if found and not line.startswith("      "):
                break
            if found or line[4 : 4 + len(name) + 1] == f"{name} ":
                found.append(line)
        assert found, f"no row {name} in\n{self.out}\n{self.err}"
        return " ".join(" ".join(found).split())


def free_port() -> int:
    """Below the ports that the kernel gives to who asks for any, so that nobody has it by the time that it is used."""
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
            return int(probe.getsockname()[1])


def rank_variables(rank: int, size: int, *, address: str = "127.0.0.1", port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def start(
    words: Sequence[object], variables: Mapping[str, str] | None = None, *, wrap: Sequence[object] = ()
) -> subprocess.Popen[str]:
    """The tool with a trainer's flags, and RANK and its kin where given."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*map(str, wrap), sys.executable, str(TOOL), *map(str, words)],
        env=inherited | {"OMP_NUM_THREADS": "1"} | dict(variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(*ranks: subprocess.Popen[str]) -> list[Ended]:
    """All of them, when they have; what hangs is killed, and fails the test."""
    try:
        told = [rank.communicate(timeout=SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [Ended(code=rank.returncode, out=out, err=err) for rank, (out, err) in zip(ranks, told, strict=True)]
