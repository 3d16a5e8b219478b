"""The lock: every route of the real server, and the middleware alone where no route goes (websockets)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_rlsc.rollout.auth import RequireKey
from megatron_rlsc.rollout.sidecar import Sidecar
from megatron_rlsc.rollout.wire import KEY_VARIABLE, bearer

UNLISTED = ["/", "/metrics", "/docs", "/openapi.json", "/nowhere", "//health", "/v1/../health"]
"""Paths that the server's own list of routes leaves out."""

MUST_BE_LISTED = {
    *("/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"),
    *("/update_weight_version", "/pause", "/resume", "/collective_rpc", "/inference/v1/generate", "/health"),
}


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), {"Authorization": "Bearer"}])
def test_no_route_answers_without_the_key(sidecar: Sidecar, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=sidecar.url, trust_env=False) as http:
        listed = http.get("/openapi.json", headers=bearer(sidecar.key)).json()["paths"]
        assert listed.keys() >= MUST_BE_LISTED
        before = http.get("/weight_info", headers=bearer(sidecar.key)).json()
        routes = [(method, path) for path, methods in listed.items() for method in methods]
        routes += [(method, path) for path in UNLISTED for method in ("GET", "POST", "OPTIONS")]
        for method, path in routes:
            answer = http.request(method, path, headers=headers, json={"new_version": "stranger"})
            assert answer.status_code == 401, f"{method} {path} answered {answer.status_code}"
        assert http.get("/weight_info", headers=bearer(sidecar.key)).json() == before
        assert http.get("/is_paused", headers=bearer(sidecar.key)).is_success


def test_the_key_is_in_no_command_line_and_no_log(sidecar: Sidecar) -> None:
    assert sidecar.key not in sidecar.log_path.read_text()
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert sidecar.key.encode() not in command_line.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile


def call(scope: dict[str, Any]) -> list[dict[str, Any]]:
    """What a client sees of an application that accepts everything, behind the lock."""
    sent: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "accepted"})

    async def receive() -> dict[str, Any]:
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(RequireKey(application)(scope, receive, send))
    return sent


def test_websockets_are_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    good = [(b"authorization", b"Bearer secret")]
    assert call({"type": "websocket", "headers": []}) == [{"type": "websocket.close", "code": 1008}]
    assert call({"type": "websocket", "headers": good}) == [{"type": "accepted"}]
    assert call({"type": "websocket", "headers": good + good})[0]["type"] == "websocket.close"
    assert call({"type": "lifespan"}) == [{"type": "accepted"}]


def test_nothing_is_served_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="set RLSC_ROLLOUT_KEY to a secret"):
        RequireKey(None)  # type: ignore[arg-type]
