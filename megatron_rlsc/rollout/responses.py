"""vLLM's answer to one prompt, checked in every respect that training relies on, as samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rlsc.types import Prompt, Sample

LOGPROB_FLOOR = -9000.0
"""vLLM writes -9999 for a log-probability that is -inf or NaN."""


class MalformedAnswerError(RuntimeError):
    """An answer that no sampler of the policy can have given."""


class StaleSampleError(RuntimeError):
    """A response, or a part of it, of other weights than those that were to make it."""


def read_samples(
    answer: Any,
    *,
    prompt: Prompt,
    group: int,
    seed: int,
    version: str,
    samples_per_prompt: int,
    max_response_length: int,
    stop_token_ids: frozenset[int],
) -> list[Sample]:
    """The samples of an `/inference/v1/generate` answer, ordered by sample.

    Raises MalformedAnswerError or StaleSampleError, with the prompt and the sample. See
    vllm/entrypoints/scale_out/token_in_token_out/protocol.py.
    """
    where = f"prompt {prompt.index} (group {group})"
    try:
        choices = {choice["index"]: _read_choice(choice) for choice in answer["choices"]}
        count = len(answer["choices"])
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedAnswerError(f"{where}: {type(error).__name__}: {error} in the answer") from error
    if count != samples_per_prompt or choices.keys() != set(range(samples_per_prompt)):
        raise MalformedAnswerError(f"{where}: {count} choices {sorted(choices)}, {samples_per_prompt} were asked for")

    samples = []
    for index in range(samples_per_prompt):
        choice, here = choices[index], f"{where}, sample {index}"
        if fault := _fault(choice, max_response_length, stop_token_ids):
            raise MalformedAnswerError(f"{here}: {fault}")
        length = len(choice.token_ids)
        if choice.versions != ((version, 0, length),):
            raise StaleSampleError(
                f"{here}: its {length} tokens are of (version, start, end) {choice.versions}, not all of {version!r}"
            )
        samples.append(
            Sample(
                group=group,
                sample=index,
                prompt_index=prompt.index,
                prompt_token_ids=prompt.token_ids,
                response_token_ids=choice.token_ids,
                rollout_logprobs=choice.logprobs,
                finish_reason=choice.finish_reason,
                seed=seed,
                version=version,
            )
        )
    return samples


def require_lag(samples: Sequence[Sample], *, step: int, version: str, lead: int) -> None:
    """Raises StaleSampleError unless what `step` is to learn from was made by weights that are at most `lead` steps
    older than the policy's, and none newer. What the journal has may be of an earlier process's pushes.

    Args:
        version: of the policy's weights, those after the step before.
    """
    for sample in samples:
        lag = None if sample.made_after is None else step - 1 - sample.made_after
        if lag is None or not 0 <= lag <= lead:
            behind = "nobody knows how many steps" if lag is None else f"{lag} steps"
            raise StaleSampleError(
                f"step {step}: group {sample.group}, sample {sample.sample} is of version {sample.version!r}, and the "
                f"policy of {version!r}: it lags {behind} behind, --rollout-lead permits {lead}. Nothing was learned "
                f"from it; without the step's file in rollouts/ the step is sampled anew"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choice:
    """One response as vLLM tells it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Any
    versions: tuple[tuple[str, int, int], ...]
    """(version, start, end) of each run of tokens that one set of weights made."""


def _read_choice(choice: Any) -> _Choice:
    spans = choice["weight_versions"] or ()
    return _Choice(
        token_ids=tuple(int(token) for token in choice["token_ids"]),
        logprobs=tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"]),
        finish_reason=choice["finish_reason"],
        versions=tuple((span["version"], span["start"], span["end"]) for span in spans),
    )


def _fault(choice: _Choice, max_response_length: int, stop_token_ids: frozenset[int]) -> str | None:
    """What is wrong with a response, if anything."""
    length = len(choice.token_ids)
    if len(choice.logprobs) != length:
        return f"{length} tokens with {len(choice.logprobs)} log-probabilities"
    for position, logprob in enumerate(choice.logprobs):
        if not math.isfinite(logprob) or logprob <= LOGPROB_FLOOR:
            return f"log-probability {logprob} at token {position}: are the weights finite?"
    stops = [position for position, token in enumerate(choice.token_ids) if token in stop_token_ids]
    stopped = choice.finish_reason == "stop" and stops == [length - 1] and length <= max_response_length
    cut = choice.finish_reason == "length" and not stops and length == max_response_length
    if stopped or cut:
        return None
    return (
        f"finished by {choice.finish_reason!r} after {length} tokens (the limit is {max_response_length}) with stop "
        f"tokens at {stops}"
    )
