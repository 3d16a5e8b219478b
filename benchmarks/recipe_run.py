"""A run of the newcomer's recipe, examples/rlsc_tiny.toml, that a benchmark makes once, and what it has left."""

from __future__ import annotations

import json
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunArgs:
    """Of a benchmark that is made of such runs."""

    sidecar_python: Path = ROOT / ".venv-sidecar/bin/python"
    """Python of the environment that has vLLM."""
    measure: bool = True
    """Make the runs that are missing; otherwise write down those that are there."""


class RecipeRun(ABC):
    """On one rank, which has one thread: on two cores the other is vLLM's, whose server and engine want more."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """Its own, beside those of the benchmark's other runs."""

    @property
    @abstractmethod
    def settings(self) -> tuple[object, ...]:
        """Flags that the recipe does not say."""

    @property
    def rows(self) -> list[dict[str, float]]:
        """Of metrics.jsonl, a step each."""
        return _read(self.folder / "metrics.jsonl")

    @property
    def held_out(self) -> dict[int, dict[str, float]]:
        """{step: figures of the evaluation after it}"""
        return {int(row["step"]): row for row in _read(self.folder / "held_out.jsonl")}

    @property
    def status(self) -> str:
        path = self.folder / "status"
        return path.read_text().strip() if path.is_file() else ""

    @property
    def ended(self) -> bool:
        return self.status.startswith("done")

    def make(self, sidecar_python: Path, problems: int) -> None:
        """Unless it has ended before; evaluated on so many held-out problems. Exits where the run fails."""
        if self.ended:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        held_out = self.folder.with_name("problems.jsonl")
        lines = (ROOT / "examples/data/addition_heldout.jsonl").read_text().splitlines()
        held_out.write_text("".join(f"{line}\n" for line in lines[:problems]))
        print(f"{self.folder.name} ...", flush=True)
        command = [sys.executable, "-m", "megatron_rlsc", "--config", ROOT / "examples/rlsc_tiny.toml", "--overwrite"]
        command += ["--load", ROOT / "checkpoints/rlsc-tiny-base", "--sidecar-python", sidecar_python]
        command += ["--output-dir", self.folder, "--eval-data-path", held_out, *self.settings]
        with self.folder.with_name(f"{self.folder.name}.log").open("w") as log:
            code = subprocess.run([*map(str, command)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        if not self.ended:
            raise SystemExit(f"{self.folder.name} ended with {code}: {log.name}")


def _read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
