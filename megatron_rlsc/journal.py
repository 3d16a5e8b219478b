"""Rollouts on disk: `step-NNNNNN.jsonl`, a sample a line, written before an update learns from it and replayed after.

The same bytes carry a step's samples from rank 0 to the other ranks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_rlsc.disk import write_whole
from megatron_rlsc.types import Sample

FIELDS = tuple(field.name for field in dataclasses.fields(Sample))
TUPLES = ("prompt_token_ids", "response_token_ids", "rollout_logprobs")


def encode(samples: Sequence[Sample]) -> bytes:
    """JSON lines; `decode` gives back equal samples (floats are written in full)."""
    lines = (json.dumps(dataclasses.asdict(sample), separators=(",", ":")) + "\n" for sample in samples)
    return "".join(lines).encode()


def decode(data: bytes, *, name: str = "samples") -> list[Sample]:
    """The samples of `encode`. Raises ValueError with `name` and the line where it is not one."""
    samples = []
    for number, line in enumerate(data.decode().splitlines(), start=1):
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict) or sorted(fields) != sorted(FIELDS):
                raise ValueError(f"the fields are not {', '.join(FIELDS)}")
            fields |= {key: tuple(fields[key]) for key in TUPLES}
            samples.append(Sample(**fields))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}, line {number}, is no sample of a rollout journal: {error}") from None
    return samples


class Journal:
    """A run's `rollouts/` folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """The file of a step, counted from 1."""
        return self.folder / f"step-{step:06d}.jsonl"

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Puts a step's samples on disk whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path(step), encode(samples))

    def read(self, step: int) -> list[Sample]:
        """A step's samples. Raises ValueError where there are none."""
        path = self.path(step)
        if not path.is_file():
            steps = sorted(file.name for file in self.folder.glob("step-*.jsonl"))
            there = f"{steps[0]} to {steps[-1]} are there" if steps else "no step-*.jsonl is there"
            raise ValueError(f"the journal {self.folder} has no {path.name} to replay ({there})")
        samples = decode(path.read_bytes(), name=str(path))
        if not samples:
            raise ValueError(f"{path} is empty")
        return samples
