"""How probable the responses of a step were, and how long: what the journal's log-probabilities come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rlsc.run_folder.journal import Journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Responses:
    """Of one step, all questions together: n responses."""

    step: int
    logprobs: tuple[float, ...]
    """[n] log p(y|x) of the sampler at the sampling temperature, summed over the response; nats."""
    lengths: tuple[int, ...]
    """[n] tokens, the stop token included."""


def journaled_steps(folder: Path) -> list[int]:
    """Steps that are whole in a `rollouts/` folder, ascending."""
    names = (path.stem.rpartition("-")[2] for path in folder.glob("step-*.jsonl"))
    return sorted(int(name) for name in names if name.isdigit())


def first_and_last(folder: Path) -> tuple[Responses, Responses] | None:
    """Of a run's `rollouts/`: the first step, which the base model answered, and the last, which the policy did that
    the step before had made. None where there are no two steps."""
    steps = journaled_steps(folder)
    if len(steps) < 2:
        return None
    return read_responses(folder, steps[0]), read_responses(folder, steps[-1])


def read_responses(folder: Path, step: int) -> Responses:
    """Raises ValueError where the step's file is damaged."""
    samples = Journal(folder).read(step)
    return Responses(
        step=step,
        logprobs=tuple(sum(sample.rollout_logprobs) for sample in samples),
        lengths=tuple(len(sample.response_token_ids) for sample in samples),
    )
