"""A repo's listing streams: one page is held at a time, however many there are."""

from __future__ import annotations

import json
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from crucible.config import Settings
from crucible.hub.client import open_repo
from crucible.refs import RepoRef
from crucible.report import Tally

PAGE = 1_000
COMMIT = "a" * 40


@contextmanager
def hub_of(pages: int) -> Iterator[str]:
    """The endpoint of a Hub with one repo of `pages` pages of files."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            page = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
            entries = [
                {
                    "type": "file",
                    "path": f"data/{number:08d}.parquet",
                    "size": 64 << 20,
                    "oid": f"{number:040x}",
                    "lfs": {"oid": f"{number:064x}", "size": 64 << 20, "pointerSize": 134},
                    "xetHash": f"{number:064x}",
                }
                for number in range(page * PAGE, (page + 1) * PAGE)
            ]
            body = json.dumps(entries).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            if page + 1 < pages:
                url = f"http://{self.headers['host']}{urlsplit(self.path).path}?recursive=true&cursor={page + 1}"
                self.send_header("link", f'<{url}>; rel="next"')
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def listed(pages: int) -> tuple[int, int]:
    """(files, most bytes held on the way)."""
    with hub_of(pages) as endpoint:
        settings = Settings.from_env({"HF_ENDPOINT": endpoint})
        with open_repo(RepoRef("org/data", COMMIT), settings, Tally()) as repo:
            list(zip(range(PAGE), repo.files(RepoRef("org/data", COMMIT)), strict=False))  # what is only made once
            tracemalloc.start()
            try:
                count = sum(1 for _ in repo.files(RepoRef("org/data", COMMIT)))
                return count, tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()


def test_a_listing_of_many_pages_holds_no_more_than_one_of_few() -> None:
    few, many = listed(3), listed(30)
    assert (few[0], many[0]) == (3 * PAGE, 30 * PAGE)
    assert many[1] < 1.5 * few[1]
