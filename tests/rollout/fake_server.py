"""A server on this machine that a run would take for a sidecar: it has a lock, and generates nothing."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ANSWERS = {
    "/health": {},
    "/v1/models": {"data": [{"id": "policy", "max_model_len": 10}]},
    "/is_paused": {"is_paused": False},
    "/inference/v1/generate": {},
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200 if self.headers["Authorization"] == "Bearer secret" else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(port: int = 0) -> Iterator[str]:
    """A server that a run would take; its url."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
