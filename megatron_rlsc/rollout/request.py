"""One prompt asked of one replica: the request, the answer as samples, and whose fault it is when there is none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_rlsc.rollout.fleet import Replica, ReplicaLostError
from megatron_rlsc.rollout.responses import MalformedAnswerError, read_samples
from megatron_rlsc.rollout.wire import bearer
from megatron_rlsc.types import Prompt, Sample

HEALTH_TIMEOUT = 10.0
"""Seconds in which a replica that has failed a request must say that it is well, or it is taken for lost."""


class RolloutError(RuntimeError):
    """A living sidecar refused a request, or a prompt got no answer in as many attempts as it has."""


class BrokenRequestError(RuntimeError):
    """The connection broke off; the replica is well."""


def request_seed(run_seed: int, step: int, group: int) -> int:
    """The seed of one prompt's request. 48 bits: vLLM adds the sample's index, and JSON readers keep 53."""
    digest = hashlib.sha256(f"{run_seed}:{step}:{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def again_seed(run_seed: int, times: int) -> int:
    """The run's seed after it has gone back so many times: its own at first, and each time another."""
    if times == 0:
        return run_seed
    return int.from_bytes(hashlib.sha256(f"{run_seed}:again:{times}".encode()).digest()[:6], "big")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """What every request of a run asks for: samples of p_old at the sampling temperature, uncut.

    There is no top-p, top-k or penalty: the loss takes each response's probability under the whole tempered
    distribution, and of one that was cut, samples would come with other probabilities than the trainer computes.
    """

    samples_per_prompt: int
    temperature: float
    """Of sampling and of the log-probabilities; positive."""
    max_response_length: int
    """Tokens, the stop token included."""
    stop_token_ids: frozenset[int]
    """The run's one stop set. The sidecar's own idea of an end is switched off."""
    seed: int
    """The run's."""

    def __post_init__(self) -> None:
        if not self.stop_token_ids:
            raise ValueError("stop_token_ids is empty: no response could end before the limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One prompt of a step."""

    prompt: Prompt
    group: int
    """Position of the prompt among the step's."""
    step: int
    version: str
    """Of the weights that must answer."""
    attempt: int = 1
    """From 1. All attempts have one seed."""


def request_body(sampling: Sampling, task: Task) -> dict[str, Any]:
    """Of `POST /inference/v1/generate`."""
    # vLLM may still be forgetting the attempt before.
    again = f"-attempt-{task.attempt}" if task.attempt > 1 else ""
    return {
        "request_id": f"step-{task.step}-group-{task.group}{again}",
        "token_ids": list(task.prompt.token_ids),
        "sampling_params": {
            "n": sampling.samples_per_prompt,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_response_length,
            "stop_token_ids": sorted(sampling.stop_token_ids),
            # Without this the eos of the model's config and generation config would stop a response as well.
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
            "seed": request_seed(sampling.seed, task.step, task.group),
        },
    }


async def ask(http: httpx.AsyncClient, replica: Replica, sampling: Sampling, task: Task) -> list[Sample]:
    """The prompt's samples, in order.

    Raises ReplicaLostError and BrokenRequestError, after which another attempt may be made; and RolloutError,
    MalformedAnswerError and StaleSampleError, which a living replica has had its time to write and which are final.
    """
    url = f"{replica.url}/inference/v1/generate"
    try:
        answer = await http.post(url, json=request_body(sampling, task), headers=bearer(replica.key))
    except httpx.ReadTimeout as error:
        raise ReplicaLostError("it has not answered a prompt in time (--rollout-timeout)") from error
    except httpx.HTTPError as error:
        what = f"POST {url}: {type(error).__name__}: {error}"
        if await _is_well(http, replica):
            raise BrokenRequestError(what) from error
        raise ReplicaLostError(what) from error
    if answer.is_server_error and not await _is_well(http, replica):
        raise ReplicaLostError(f"POST {url} answered {answer.status_code}: {answer.text.strip()}")
    if answer.status_code != httpx.codes.OK:
        raise RolloutError(f"{url} answered {answer.status_code}: {answer.text.strip()}")
    try:
        content = answer.json()
    except ValueError as error:
        raise MalformedAnswerError(f"{url} answered no JSON: {error}") from error
    if _was_aborted(content):
        raise ReplicaLostError("it has broken off a prompt: it is being shut down, or paused by somebody else")
    return read_samples(
        content,
        prompt=task.prompt,
        group=task.group,
        seed=request_seed(sampling.seed, task.step, task.group),
        version=task.version,
        samples_per_prompt=sampling.samples_per_prompt,
        max_response_length=sampling.max_response_length,
        stop_token_ids=sampling.stop_token_ids,
    )


def _was_aborted(content: Any) -> bool:
    """Whether vLLM was told to stop before the response had ended; nobody of ours does so while it generates."""
    choices = content.get("choices") if isinstance(content, dict) else None
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") == "abort" for choice in choices
    )


async def _is_well(http: httpx.AsyncClient, replica: Replica) -> bool:
    try:
        answer = await http.get(f"{replica.url}/health", headers=bearer(replica.key), timeout=HEALTH_TIMEOUT)
    except httpx.HTTPError:
        return False
    return answer.status_code == httpx.codes.OK
