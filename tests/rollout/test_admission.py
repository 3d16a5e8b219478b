"""Who is asked at all, against servers that we write here; test_generate.py has the real one. No vLLM."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from megatron_rlsc.rollout.admission import RefusedError, UnreachableError, admit

URL = "http://sidecar:1"


def try_server(*, longest: int = 10, **changes: Any) -> list[str]:
    """Tries a good server, but for the changes; the paths that it was asked for with the key."""
    answers = {
        "/health": httpx.Response(200),
        "/v1/models": httpx.Response(200, json={"data": [{"id": "policy", "max_model_len": 10}]}),
        "/is_paused": httpx.Response(200, json={"is_paused": False}),
        "/inference/v1/generate": httpx.Response(200, json={}),
    }
    answers |= {f"/{path.replace('__', '/')}": answer for path, answer in changes.items() if path != "stranger"}
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["Authorization"] != "Bearer secret":
            return changes.get("stranger", httpx.Response(401))
        paths.append(request.url.path)
        return answers[request.url.path]

    admit(URL, "secret", longest=longest, transport=httpx.MockTransport(answer))
    return paths


def test_a_good_server_generates_before_it_is_trusted() -> None:
    assert try_server() == ["/v1/models", "/is_paused", "/inference/v1/generate"]


def test_a_server_that_an_earlier_push_left_paused_waits_for_the_next() -> None:
    assert try_server(is_paused=httpx.Response(200, json={"is_paused": True}))[-1] == "/is_paused"


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_server_without_a_lock_is_refused(status: int) -> None:
    with pytest.raises(RefusedError, match=f"{URL} answers {status} to a request without the key: anybody could"):
        try_server(stranger=httpx.Response(status))


def test_a_server_with_another_key_is_refused() -> None:
    with pytest.raises(RefusedError, match=f"{URL} refuses our key: .*--rollout-key-file"):
        try_server(v1__models=httpx.Response(401))


def test_a_server_of_another_model_is_refused() -> None:
    with pytest.raises(RefusedError, match=f"{URL} serves Qwen, not 'policy'"):
        try_server(v1__models=httpx.Response(200, json={"data": [{"id": "Qwen", "max_model_len": 10}]}))


def test_a_server_that_is_too_small_is_refused() -> None:
    with pytest.raises(RefusedError, match=f"need 11 tokens, {URL} holds 10: lower --max-response-length, or raise"):
        try_server(longest=11)


def test_an_engine_that_is_not_up_may_come_yet_and_one_that_fails_is_refused() -> None:
    with pytest.raises(UnreachableError, match="answered 503"):
        try_server(inference__v1__generate=httpx.Response(503))
    with pytest.raises(RefusedError, match="answered 500: no engine"):
        try_server(inference__v1__generate=httpx.Response(500, text="no engine"))


def test_nobody_there() -> None:
    with pytest.raises(UnreachableError, match=r"GET http://127\.0\.0\.1:9/health: ConnectError"):
        admit("http://127.0.0.1:9", "k", longest=1)
