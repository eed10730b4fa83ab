"""A Hub that says what a test tells it to: any listing, any headers, any body. It serves one dataset, `org/bad`.

with BadHub({"train.jsonl": b'{"a": 1}\\n'}) as hub:
    hub.answers["/resolve/"] = lambda talk: talk.reply(b"", status="500 No")
    crucible.load_dataset("org/bad", endpoint=hub.url)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from tests.fakes.wired import Talk, Wired

REPO = "org/bad"
COMMIT = "c" * 40


def entry(path: Any, content: bytes, **said: Any) -> dict[str, Any]:
    """One line of a listing, true unless `said` says otherwise."""
    oid = hashlib.sha256(content).hexdigest()
    lfs = {"oid": oid, "size": len(content), "pointerSize": 100}
    return {"type": "file", "path": path, "size": len(content), "oid": "0" * 40, "lfs": lfs, **said}


class BadHub(Wired):
    """`files` as a Hub would serve them, until `answers` (part of the path -> handler) or `listing` say otherwise."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.listing: list[Any] | None = None
        self.answers: dict[str, Any] = {}
        super().__init__(self._answer)

    def _answer(self, talk: Talk) -> None:
        path = talk.path
        handler = next((handler for part, handler in self.answers.items() if part in path), None)
        if handler is not None:
            handler(talk)
        elif "/revision/" in path:
            talk.reply(json.dumps({"sha": COMMIT, "id": REPO}).encode())
        elif "/tree/" in path:
            listed = [entry(name, content) for name, content in self.files.items()]
            talk.reply(json.dumps(self.listing if self.listing is not None else listed).encode())
        elif (name := unquote(path.partition(f"/resolve/{COMMIT}/")[2])) in self.files:
            content = self.files[name]
            start, stop = 0, len(content)
            for line in talk.head.lower().split("\r\n"):
                if line.startswith("range: bytes="):
                    first, _, last = line.removeprefix("range: bytes=").partition("-")
                    start, stop = int(first), min(stop, int(last) + 1)
            if (start, stop) == (0, len(content)):
                talk.reply(content)
            else:
                said = f"Content-Range: bytes {start}-{stop - 1}/{len(content)}"
                talk.reply(content[start:stop], said, status="206 Partial Content")
        else:
            talk.reply(b"", "X-Error-Code: EntryNotFound", status="404 Not Found")
