"""The other end of worker.py: a side that is started, asked for a step, and ended."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rlsc.run_folder.journal import encode
from megatron_rlsc.types import Sample
from sides.measure import Cost
from sides.work import Outcome, Setup

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A side with its settings."""

    name: str
    module: str
    """In this folder."""
    micro_batches: tuple[int, ...] = (0,)
    """Responses at a time that are tried; 0 where the side packs them."""
    shown: tuple[int, ...] = ()
    """Those of them that are measured whether or not they are the quickest."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of ours, by section of the recipe."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of its processes, besides."""
    python: Path = field(default_factory=lambda: Path(sys.executable))


class Worker:
    """A process that takes steps when it is asked, and waits in between."""

    def __init__(self, variant: Variant, setup: Setup, *, threads: int = 1) -> None:
        self.variant = variant
        setup = dataclasses.replace(setup, settings=variant.settings)
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "errors"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [
                    *(variant.python, "-W", "ignore", "-m", "sides.worker", variant.module),
                    *(json.dumps(dataclasses.asdict(setup), default=str), str(threads)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(setup, threads) | variant.environment,
            )
        self.parameters: int = self._read()["parameters"]

    def step(self, samples: list[Sample], micro_batch: int, *, save: Path | None = None) -> tuple[Outcome, Cost]:
        """Takes a step and measures it; then saves the weights, by HF name."""
        request: dict[str, Any] = {"samples": encode(samples).decode(), "micro_batch": micro_batch}
        request |= {} if save is None else {"save": str(save)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        cost = Cost(**{field.name: answer.pop(field.name) for field in dataclasses.fields(Cost)})
        return Outcome(**answer), cost

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"{self.variant.name} ended with {code}:\n{self._errors.read_text()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def environment(setup: Setup, threads: int) -> dict[str, str]:
    """Of a worker: nothing is fetched. Megatron-core takes a GPU that it sees, so none is seen where none is meant."""
    paths = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    offline = {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")}
    return os.environ | paths | offline | ({} if setup.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
