"""What a server must show before this run trusts it with requests: that it is locked, ours, large enough, and alive."""

from __future__ import annotations

from typing import Any

import httpx

from megatron_rlsc.rollout.wire import SERVED_MODEL_NAME, bearer

REQUEST_TIMEOUT = 10.0
"""Seconds for each question but the first token."""
FIRST_TOKEN_TIMEOUT = 120.0
"""Seconds: vLLM may compile when it generates first."""


class UnreachableError(RuntimeError):
    """Nobody answers, or not in time: it may be starting still."""


class RefusedError(RuntimeError):
    """It answers, and is not fit for this run."""


def admit(url: str, key: str, *, longest: int, transport: httpx.BaseTransport | None = None) -> None:
    """Returns where the server at `url` refuses strangers, takes `key`, serves the policy, holds `longest` tokens of
    prompt and response together, and generates a token.

    One that is paused is taken at its word, since an earlier push that failed has left it so: the next push resumes it.

    Raises UnreachableError where another try may find it up, RefusedError otherwise.
    """
    with httpx.Client(
        base_url=url, headers=bearer(key), timeout=REQUEST_TIMEOUT, transport=transport, trust_env=False
    ) as http:
        stranger = _request(http, "GET", "/health", headers={"Authorization": ""})
        if stranger.status_code != httpx.codes.UNAUTHORIZED:
            raise RefusedError(
                f"{url} answers {stranger.status_code} to a request without the key: anybody could change its weights. "
                "Start it with `python -m megatron_rlsc.rollout.serve`"
            )
        answer = _request(http, "GET", "/v1/models")
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            raise RefusedError(
                f"{url} refuses our key: it was started with another RLSC_ROLLOUT_KEY than this run has from "
                "--rollout-key-file, or from its own RLSC_ROLLOUT_KEY"
            )
        served = {model["id"]: model["max_model_len"] for model in _json(answer)["data"]}
        if SERVED_MODEL_NAME not in served:
            raise RefusedError(
                f"{url} serves {', '.join(served)}, not {SERVED_MODEL_NAME!r}: start it with "
                "`python -m megatron_rlsc.rollout.serve`"
            )
        if longest > served[SERVED_MODEL_NAME]:  # vLLM would cut responses in silence
            raise RefusedError(
                f"the longest prompt and a response need {longest} tokens, {url} holds {served[SERVED_MODEL_NAME]}: "
                "lower --max-response-length, or raise its --max-model-len"
            )
        if not _json(_request(http, "GET", "/is_paused"))["is_paused"]:
            generate_a_token(http)


def generate_a_token(http: httpx.Client) -> None:
    """/health alone also answers for an engine that has stopped. Raises UnreachableError and RefusedError."""
    body = {"token_ids": [0], "sampling_params": {"max_tokens": 1, "temperature": 0.0, "detokenize": False}}
    _json(_request(http, "POST", "/inference/v1/generate", json=body, timeout=FIRST_TOKEN_TIMEOUT))


def _request(http: httpx.Client, method: str, path: str, **arguments: Any) -> httpx.Response:
    try:
        return http.request(method, path, **arguments)
    except httpx.HTTPError as error:
        raise UnreachableError(f"{method} {http.base_url.join(path)}: {type(error).__name__}: {error}") from error


def _json(answer: httpx.Response) -> Any:
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise UnreachableError(f"{answer.request.url} answered 503: its engine is not up")
    if answer.status_code != httpx.codes.OK:
        raise RefusedError(f"{answer.request.url} answered {answer.status_code}: {answer.text.strip()}")
    try:
        return answer.json()
    except ValueError as error:
        raise RefusedError(f"{answer.request.url} answered no JSON: {error}") from error
