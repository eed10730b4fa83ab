"""Which source is asked next, and what a failure means for it. Bookkeeping of one file's download; no I/O, no clock.

Sources stand in order of cost. The first that is still trusted is asked; one that failed without giving a byte makes
way for the next at once, and only when there is no other is there a wait. A source is dropped when it refuses for a
reason that will not pass, when one part failed on it `tries` times without a new byte, or when it lied twice.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from crucible.errors import (
    ChecksumMismatch,
    CrucibleError,
    OfflineMode,
    RepoError,
    SizeMismatch,
    SourceUnavailable,
    TransferError,
)
from crucible.hub.http import Refusal, backoff, said_wait
from crucible.refs import SourceFile
from crucible.workers.sources import LinkExpired, Source

LIES_ALLOWED = 2
"""How often one source may deliver wrong bytes before it is dropped: one flipped bit may be the network's."""


@dataclass(slots=True)
class Failures:
    """What one part of a file has been through on each source since its last new byte. Owned by the part."""

    times: dict[str, int] = field(default_factory=dict)
    expired: dict[str, int] = field(default_factory=dict)

    def forget(self) -> None:
        """A byte came: what happened before does not count any more."""
        self.times.clear()
        self.expired.clear()


class Ladder:
    """The sources of one file.

    Concurrency: every method may be called from any thread.
    """

    def __init__(self, file: SourceFile, sources: Sequence[Source], *, tries: int, backoff_cap_s: float) -> None:
        self._file, self._sources = file, list(sources)
        self._tries, self._cap_s = tries, backoff_cap_s
        self._lock = threading.Lock()
        self._lies: dict[str, int] = {}
        self._dropped: dict[str, Exception] = {}

    def pick(self, failures: Failures, avoid: str = "") -> Source:
        """The source to ask now: trusted, fewest lies, fewest failures of this part, cheapest. `avoid` goes last.

        Raises what the last dropped source said when none is left.
        """
        with self._lock:
            left = [source for source in self._sources if source.name not in self._dropped]
            if not left:
                raise self._final()
            return min(
                left,
                key=lambda s: (s.name == avoid, self._lies.get(s.name, 0), failures.times.get(s.name, 0)),
            )

    def named(self, name: str) -> Source:
        return next(source for source in self._sources if source.name == name)

    def others(self, name: str) -> bool:
        """True if a source other than `name` may be asked."""
        with self._lock:
            return any(source.name != name and source.name not in self._dropped for source in self._sources)

    def failed(self, source: Source, error: Exception, failures: Failures) -> float:
        """Note a failure; seconds to wait before the part is tried again. `pick` then says where, or raises.

        Raises `error` itself when no source can help: a disk that is full, a bug.
        """
        name = source.name
        if isinstance(error, LinkExpired):
            failures.expired[name] = failures.expired.get(name, 0) + 1
            if failures.expired[name] >= self._tries:
                self._drop(source, source.refused(self._file, error), error)
            return 0.0
        if isinstance(error, ChecksumMismatch | SizeMismatch):
            self.lied([name], error)
            return 0.0
        if isinstance(error, TransferError | RepoError | OfflineMode):
            self._drop(source, error)
            return 0.0
        if not isinstance(error, Refusal):
            raise error
        failures.times[name] = failures.times.get(name, 0) + 1
        if not error.retryable or failures.times[name] >= self._tries:
            self._drop(source, source.refused(self._file, error), error)
            return 0.0
        if self.others(name) and failures.times[name] <= 1:
            return 0.0  # another source is nearer than any wait
        if said_wait(error.status, error.headers) is not None:
            return 0.0  # the governor has heard it, and lets nobody through until then
        return backoff(failures.times[name] - 1, cap_s=self._cap_s)

    def lied(self, names: Sequence[str], error: CrucibleError) -> None:
        """What came was wrong, and these sources had a part in it."""
        with self._lock:
            for name in names:
                self._lies[name] = self._lies.get(name, 0) + 1
                if self._lies[name] >= LIES_ALLOWED:
                    self._dropped[name] = error

    def _drop(self, source: Source, error: Exception, cause: Exception | None = None) -> None:
        if cause is not None:
            error.__cause__ = cause
        with self._lock:
            self._dropped[source.name] = error

    def _final(self) -> Exception:
        """What to raise when nobody is left: what the last resort (the Hub) said, with a note of the others' words."""
        if not self._sources:
            return SourceUnavailable(self._file.path, "anywhere", "no source was given")
        *before, last = (self._dropped[source.name] for source in self._sources)
        for error in before:
            note = f"tried before: {error}"
            if error is not last and note not in getattr(last, "__notes__", ()):
                last.add_note(note)
        return last
