"""Rollouts on disk: `step-NNNNNN.jsonl`, a sample a line, written before an update learns from it and replayed after.

A run that was killed and goes on makes the same updates of what it had sampled. The same bytes carry a step's samples
from rank 0 to the other ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_rlsc.disk import write_whole
from megatron_rlsc.types import Prompt, Sample

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
    """A run's `rollouts/` folder: whole steps, and the groups of the step that is being sampled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """The file of a whole step, counted from 1."""
        return self.folder / f"step-{step:06d}.jsonl"

    def begun_path(self, step: int) -> Path:
        """The file of a step that is being sampled: groups in the order in which they ended."""
        return self.folder / f"begun-{step:06d}.jsonl"

    def write(self, step: int, samples: Sequence[Sample]) -> None:
        """Puts a step's samples on disk whole, or not at all; its groups have no file of their own any more."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.path(step), encode(samples))
        self.begun_path(step).unlink(missing_ok=True)

    def add(self, step: int, group: Sequence[Sample]) -> None:
        """Puts all samples of one prompt on disk, before the rest of the step has been sampled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.begun_path(step).open("ab+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                file.write(b"\n")  # a kill has cut the last line
            file.write(encode(group))
            file.flush()
            os.fsync(file.fileno())

    def finished(self, step: int, prompts: Sequence[Prompt], samples_per_prompt: int) -> dict[int, list[Sample]]:
        """{group: its samples} of what has been sampled for a step already: of all prompts, of some, or of none.

        A line that a kill or a power cut has damaged, and a group that is not whole or answers another prompt, are as
        if never sampled.
        """
        for path in (self.path(step), self.begun_path(step)):
            if path.is_file():
                groups = _groups(path)
                return {
                    number: groups[number]
                    for number, prompt in enumerate(prompts)
                    if number in groups and _answers(groups[number], prompt, samples_per_prompt)
                }
        return {}

    def read(self, step: int) -> list[Sample]:
        """A whole step's samples. Raises ValueError where there are none."""
        path = self.path(step)
        if not path.is_file():
            steps = sorted(file.name for file in self.folder.glob("step-*.jsonl"))
            there = f"{steps[0]} to {steps[-1]} are there" if steps else "no step-*.jsonl is there"
            raise ValueError(f"the journal {self.folder} has no {path.name} to replay ({there})")
        samples = decode(path.read_bytes(), name=str(path))
        if not samples:
            raise ValueError(f"{path} is empty")
        return samples

    def forget_after(self, step: int) -> None:
        """Deletes what was sampled for later steps: it is not what this run would sample."""
        for path in self.folder.glob("*-*.jsonl"):
            number = path.stem.rpartition("-")[2]
            if number.isdigit() and int(number) > step:
                path.unlink()


def _groups(path: Path) -> dict[int, list[Sample]]:
    """{group: its samples in order} of the lines that are whole."""
    groups: dict[int, list[Sample]] = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            for sample in decode(line, name=str(path)):
                groups.setdefault(sample.group, []).append(sample)
    return groups


def _answers(samples: Sequence[Sample], prompt: Prompt, samples_per_prompt: int) -> bool:
    return [sample.sample for sample in samples] == list(range(samples_per_prompt)) and all(
        (sample.prompt_index, sample.prompt_token_ids) == (prompt.index, prompt.token_ids) for sample in samples
    )
