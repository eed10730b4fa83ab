"""What was asked of the server and what it sent: a list for tests and people, JSON lines for the product.

A record says whether a token came, never which.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Literal

Origin = Literal["hub", "cdn"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, with what had been sent of its reply when the record was read."""

    time: float
    """Unix seconds when the request was read."""
    method: str
    path: str
    """Without the query: the query of a CDN link holds a signature."""
    range: str | None
    had_token: bool
    status: int
    """0 while no status line was sent."""
    sent: int
    """Body bytes given to the kernel."""
    origin: Origin
    bucket: str
    """Whose quota paid: api, resolvers, pages, or cdn (no quota)."""
    done: bool
    """Whether the reply has ended, in whatever way."""
    user_agent: str = ""


class Entry:
    """A record being filled in. One server task writes it; `RequestLog` reads it from any thread."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record

    def sent(self, count: int) -> None:
        self.record = replace(self.record, sent=self.record.sent + count)


class RequestLog:
    """The last `keep` requests in the order they came, and optionally all of them as JSON lines.

    Concurrency: `begin` and `end` from the server's thread, `records` from any.
    """

    def __init__(self, path: Path | None = None, *, keep: int) -> None:
        self._entries: deque[Entry] = deque(maxlen=keep)
        self._guard = threading.Lock()
        self._stream: IO[str] | None = path.open("a", encoding="utf-8") if path else None
        self.open = 0  # requests whose reply has not ended

    def begin(self, record: RequestRecord) -> Entry:
        entry = Entry(record)
        with self._guard:
            self._entries.append(entry)
            self.open += 1
        return entry

    def end(self, entry: Entry, status: int) -> None:
        entry.record = replace(entry.record, status=status, done=True)
        with self._guard:
            self.open -= 1
            if self._stream:
                self._stream.write(json.dumps(asdict(entry.record)) + "\n")
                self._stream.flush()

    def records(self) -> list[RequestRecord]:
        with self._guard:
            return [entry.record for entry in self._entries]

    def clear(self) -> None:
        with self._guard:
            self._entries.clear()

    def close(self) -> None:
        if self._stream:
            self._stream.close()
            self._stream = None
