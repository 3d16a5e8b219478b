"""Responses over HTTP: token ids in, token ids and log-probabilities out. No torch, no vllm."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import httpx
from tqdm import tqdm

from megatron_rlsc.rollout.responses import MalformedAnswerError, read_samples
from megatron_rlsc.rollout.wire import SERVED_MODEL_NAME, bearer
from megatron_rlsc.types import Prompt, Sample

CONNECT_ATTEMPTS = 3
"""Of one request, while its connection is refused. What has been answered, well or badly, is never asked for again."""


class RolloutError(RuntimeError):
    """The sidecar did not answer, refused a request, or is not fit for this run."""


def request_seed(run_seed: int, step: int, group: int) -> int:
    """The seed of one prompt's request. 48 bits: vLLM adds the sample's index, and JSON readers keep 53."""
    digest = hashlib.sha256(f"{run_seed}:{step}:{group}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


class RolloutClient:
    """Asks one sidecar for samples of p_old at the sampling temperature, uncut by top-k, top-p or penalties."""

    def __init__(
        self,
        url: str,
        *,
        key: str,
        samples_per_prompt: int,
        temperature: float,
        max_response_length: int,
        stop_token_ids: Sequence[int],
        seed: int,
        timeout: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """
        Args:
            url: the sidecar's, http://host:port.
            key: its secret.
            samples_per_prompt: responses a prompt; at most the sidecar's --max-num-seqs.
            temperature: of sampling and of the log-probabilities; positive.
            max_response_length: tokens, the stop token included.
            stop_token_ids: the run's one stop set. The sidecar's own idea of an end is switched off.
            seed: the run's.
            timeout: seconds that one prompt's request may wait for its answer, queueing included.
            transport: in place of the network, in tests.
        """
        if not stop_token_ids:
            raise ValueError("stop_token_ids is empty: no response could end before the limit")
        self._url, self._key, self._timeout, self._transport = url, key, timeout, transport
        self._samples_per_prompt = samples_per_prompt
        self._max_response_length = max_response_length
        self._stop_token_ids = frozenset(stop_token_ids)
        self._seed = seed
        self._max_model_len: int | None = None
        self._sampling_params = {
            "n": samples_per_prompt,
            "temperature": temperature,
            "max_tokens": max_response_length,
            "stop_token_ids": sorted(self._stop_token_ids),
            # Without this the eos of the model's config and generation config would stop a response as well.
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        }

    def connect(self, *, longest_prompt: int) -> None:
        """Checks, before any training, that the sidecar is locked, is ours, and holds a prompt and its response.

        Args:
            longest_prompt: tokens of the run's longest prompt.

        Raises RolloutError otherwise.
        """
        asyncio.run(self._connect(longest_prompt))

    def generate(self, prompts: Sequence[Prompt], *, step: int, version: str) -> list[Sample]:
        """`samples_per_prompt` responses to each prompt, ordered by (group, sample); group is the prompt's position.

        All prompts are asked at once and the sidecar queues them. The first failure cancels the rest.

        Args:
            prompts: the step's.
            step: goes into the seeds with the run's seed and the group.
            version: of the last push; a sample with a token of any other is refused.

        Raises StaleSampleError, MalformedAnswerError, RolloutError.
        """
        for prompt in prompts:
            self._check_length(len(prompt.token_ids))
        groups = asyncio.run(self._generate(prompts, step, version))
        return [sample for group in groups for sample in group]

    async def _connect(self, longest_prompt: int) -> None:
        async with self._open() as http:
            unlocked = await self._request(http, "GET", "/health", headers={"Authorization": ""})
            if unlocked.status_code != httpx.codes.UNAUTHORIZED:
                raise RolloutError(
                    f"{self._url} answers {unlocked.status_code} to a request without the key: anybody could change "
                    "its weights. Start it with `python -m megatron_rlsc.rollout.serve`"
                )
            models = _checked(await self._request(http, "GET", "/v1/models"))["data"]
        served = {model["id"]: model["max_model_len"] for model in models}
        if SERVED_MODEL_NAME not in served:
            raise RolloutError(f"{self._url} serves {', '.join(served)}, not {SERVED_MODEL_NAME!r}")
        self._max_model_len = served[SERVED_MODEL_NAME]
        self._check_length(longest_prompt)

    async def _generate(self, prompts: Sequence[Prompt], step: int, version: str) -> list[list[Sample]]:
        total = len(prompts) * self._samples_per_prompt
        shown = sys.stderr.isatty()
        with tqdm(total=total, desc="rollout", unit="response", leave=False, disable=not shown) as progress:
            async with self._open() as http:

                async def ask(group: int, prompt: Prompt) -> list[Sample]:
                    samples = await self._ask(http, prompt, step=step, group=group, version=version)
                    progress.update(len(samples))
                    return samples

                tasks = [asyncio.create_task(ask(group, prompt)) for group, prompt in enumerate(prompts)]
                try:
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

    async def _ask(
        self, http: httpx.AsyncClient, prompt: Prompt, *, step: int, group: int, version: str
    ) -> list[Sample]:
        seed = request_seed(self._seed, step, group)
        body = {
            "request_id": f"step-{step}-group-{group}",
            "token_ids": list(prompt.token_ids),
            "sampling_params": {**self._sampling_params, "seed": seed},
        }
        answer = _checked(await self._request(http, "POST", "/inference/v1/generate", json=body))
        return read_samples(
            answer,
            prompt=prompt,
            group=group,
            seed=seed,
            version=version,
            samples_per_prompt=self._samples_per_prompt,
            max_response_length=self._max_response_length,
            stop_token_ids=self._stop_token_ids,
        )

    def _open(self) -> httpx.AsyncClient:
        """A client of this call's event loop. No proxies: the sidecar is here or on the cluster's network."""
        transport = self._transport or httpx.AsyncHTTPTransport(
            retries=CONNECT_ATTEMPTS - 1, limits=httpx.Limits(max_connections=None)
        )
        return httpx.AsyncClient(
            base_url=self._url, headers=bearer(self._key), timeout=self._timeout, transport=transport, trust_env=False
        )

    async def _request(self, http: httpx.AsyncClient, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return await http.request(method, path, **arguments)
        except httpx.HTTPError as error:
            raise RolloutError(f"{method} {self._url}{path}: {type(error).__name__}: {error}") from error

    def _check_length(self, prompt_length: int) -> None:
        """vLLM would cut the response in silence."""
        needed = prompt_length + self._max_response_length
        if self._max_model_len is not None and needed > self._max_model_len:
            raise RolloutError(
                f"a prompt of {prompt_length} tokens and a response of {self._max_response_length} need {needed}, the "
                f"sidecar holds {self._max_model_len}: lower max_response_length, or raise its --max-model-len"
            )


def _checked(response: httpx.Response) -> Any:
    if response.status_code != httpx.codes.OK:
        raise RolloutError(f"{response.request.url} answered {response.status_code}: {response.text.strip()}")
    try:
        return response.json()
    except ValueError as error:
        raise MalformedAnswerError(f"{response.request.url} answered no JSON: {error}") from error
