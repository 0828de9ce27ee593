"""An S3 endpoint for tests: moto's simulator behind a proxy that fails a seeded part of all requests.

A failure is, in turn: 503 SlowDown, 500, 429, a connection closed without an answer, or an answer cut in the middle.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "keep-alive"}
_FAILURES = ("503", "500", "429", "close", "cut")


class FaultyProxy:
    """Forwards to `host:port`; every request fails with probability `rate`."""

    def __init__(self, host: str, port: int, rate: float, seed: int = 0) -> None:
        self.num_requests = 0
        self.num_failures = 0
        self.rate = rate
        self.refusal: tuple[int, str] | None = None  # (status, code) of every answer, as of wrong credentials
        dice, kinds, lock = random.Random(seed), itertools.cycle(_FAILURES), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _forward(self) -> None:
                body = self._body()
                with lock:
                    proxy.num_requests += 1
                    failure = next(kinds) if dice.random() < proxy.rate else ""
                    proxy.num_failures += bool(failure)
                if proxy.refusal:
                    status, code = proxy.refusal
                    text = f"<Error><Code>{code}</Code><Message>{code} it is</Message></Error>"
                    self._answer(status, [("Content-Type", "application/xml")], text.encode(), False)
                    return
                if failure == "close":
                    self.close_connection = True
                    return
                if failure in ("503", "500", "429"):
                    self._answer(int(failure), [], b"<Error><Code>SlowDown</Code></Error>", False)
                    return
                connection = http.client.HTTPConnection(host, port, timeout=30)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                self._answer(response.status, response.getheaders(), response.read(), failure == "cut")
                connection.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward

            def _body(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                del self.headers["Transfer-Encoding"]
                return b"".join(parts)

            def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool) -> None:
                self.send_response_only(status)
                length = {k.lower(): v for k, v in headers}.get("content-length", str(len(body)))
                for name, value in headers:
                    if name.lower() not in _HOP_HEADERS:
                        self.send_header(name, value)
                self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    if self.command != "HEAD":
                        self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
