"""The lock on the sidecar's door: ASGI middleware that wants the key on every route.

vLLM's own `--api-key` guards a few prefixes and leaves the weight-transfer and administration routes open.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_rlsc.rollout.wire import KEY_VARIABLE, bearer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def required_key() -> str:
    """The key from the environment. Raises ValueError without one: a sidecar is never served open."""
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise ValueError(f"set {KEY_VARIABLE} to a secret: the sidecar serves nobody without it")
    return key


class RequireKey:
    """Passes on the requests that carry the key, whatever their method and path; 401 to the rest."""

    def __init__(self, app: Application) -> None:
        self._app = app
        self._expected = bearer(required_key())["Authorization"].encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": "this server wants its key"}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _has_key(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._expected)
