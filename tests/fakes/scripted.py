"""A peer whose replies a test writes by hand, over a real socket."""

from __future__ import annotations

import http.server
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

DATA = random.Random(3).randbytes(2_400_000)


class Request:
    """One request as a script of the server sees it."""

    def __init__(self, handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        self.handler, self.number = handler, number
        start, stop = handler.headers["range"].removeprefix("bytes=").split("-")
        self.start, self.stop = int(start), int(stop) + 1

    def send(
        self, body: bytes, *, status: int = 206, length: int | None = None, content_range: str = "", etag: str = ""
    ) -> None:
        self.handler.send_response(status)
        self.handler.send_header("content-length", str(len(body) if length is None else length))
        if status == 206:
            said = content_range or f"bytes {self.start}-{self.stop - 1}/{len(DATA)}"
            self.handler.send_header("content-range", said)
        if etag:
            self.handler.send_header("etag", etag)
        self.handler.end_headers()
        self.raw(body)
        if length is not None and length > len(body):
            self.handler.close_connection = True
            self.handler.wfile.flush()
            self.handler.connection.shutdown(2)

    def right(self) -> None:
        self.send(DATA[self.start : self.stop])

    def begin(self) -> None:
        """The right headers, and no byte yet."""
        self.handler.send_response(206)
        self.handler.send_header("content-length", str(self.stop - self.start))
        self.handler.send_header("content-range", f"bytes {self.start}-{self.stop - 1}/{len(DATA)}")
        self.handler.end_headers()

    def part(self, size: int) -> None:
        self.raw(DATA[self.start : self.start + size])

    def body(self) -> None:
        self.raw(DATA[self.start : self.stop])

    def raw(self, data: bytes) -> None:
        with suppress(ConnectionError):
            self.handler.wfile.write(data)
            self.handler.wfile.flush()


@contextmanager
def server(script: Callable[[Request], None]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """A peer whose replies `script` writes. Yields its url and the ranges it was asked for."""
    asked: list[tuple[int, int]] = []
    guard = threading.Lock()  # of two that come at once only one is the first

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with guard:
                request = Request(self, len(asked))
                asked.append((request.start, request.stop))
            script(request)

        def log_message(self, format: str, *args: object) -> None:
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}", asked
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join(10)
