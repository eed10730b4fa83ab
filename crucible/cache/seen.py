"""Which shards were seen to have the right bytes, so that opening one costs a look at its file and not a hash of it.

<home>/seen/<ab>    a line a look, of all shards whose key begins so; the last line of a shard and a boot counts:
    <key> <digest of the file> <boot> <inode> <size> <mtime in ns> <ctime in ns>

A shard is noted when it gets its name, because it was verified then, and whenever it was hashed since. The note holds
while the file is the same one, unchanged as far as the file system knows, and this boot lasts: what rots on a disk
that is switched off is found when the shard is first opened. What rots under a running machine, with no write that the
file system saw, only `workers.scrub` finds. A note that is lost, or cannot be written, costs a hash.
"""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from crucible.cache.owner import Owner

SPARE_LINES = 4
"""Lines a living note that a file may have before it is written anew."""
LEAST_BYTES = 64 << 10
Stamp = tuple[int, int, int, int]
"""Inode, size, mtime and ctime in ns: changes with every write that the file system knows of."""


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@dataclass(slots=True)
class _Page:
    """One file, as far as it was read."""

    inode: int = 0
    end: int = 0
    notes: dict[str, tuple[str, Stamp | None]] = field(default_factory=dict)
    """key -> (digest, stamp); no stamp where that was another boot's."""


class Seen:
    """The notes of one store. Concurrency: any thread; any number of processes, on a disk that appends whole lines."""

    def __init__(self, folder: Path, shards: Path | None = None) -> None:
        """`shards` is where the shards lie, by which those that are gone for good are told."""
        self._folder, self._shards = folder, shards
        self._lock = threading.Lock()
        self._pages: dict[str, _Page] = {}
        self._boot = (Owner.current().boot or "unknown")[:8]

    def digest(self, key: str, stamp: Stamp) -> str | None:
        """What the file with this stamp was seen to hash to, this boot; None: nobody has looked, or it has changed."""
        with self._lock:
            page = self._pages.get(key[:2])
            note = None if page is None else page.notes.get(key)
            if note is None or note[1] != stamp:
                note = self._read(key[:2]).notes.get(key)  # another process may have looked since
            return note[0] if note is not None and note[1] == stamp else None

    def expected(self, key: str) -> str | None:
        """What the shard was last seen to hash to, whatever has become of its file."""
        with self._lock:
            note = self._read(key[:2]).notes.get(key)
            return note[0] if note is not None else None

    def note(self, key: str, digest: str, stamp: Stamp) -> None:
        """The file with this stamp was hashed. Never fails: what cannot be written is known to this process only."""
        line = f"{key} {digest} {self._boot} {' '.join(map(str, stamp))}\n".encode()
        with self._lock:
            page = self._pages.setdefault(key[:2], _Page())
            page.notes[key] = (digest, stamp)
            path = self._folder / key[:2]
            with suppress(OSError):
                try:
                    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                except FileNotFoundError:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                try:
                    if os.write(descriptor, line) < len(line):
                        os.write(descriptor, b"\n")  # a full disk: half a line counts for nothing
                    end = os.fstat(descriptor).st_size
                finally:
                    os.close(descriptor)
                if end > LEAST_BYTES and end > SPARE_LINES * len(line) * len(page.notes):
                    self._tidy(key[:2], end // (SPARE_LINES * len(line)))

    # --- with the lock held

    def _read(self, name: str) -> _Page:
        """Take in what was appended since the last look."""
        page = self._pages.setdefault(name, _Page())
        with suppress(OSError), (self._folder / name).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != page.inode or status.st_size < page.end:
                page.inode, page.end = status.st_ino, 0  # what this process itself knows stays
            data = os.pread(file.fileno(), status.st_size - page.end, page.end)
            whole = data.rfind(b"\n") + 1
            page.end += whole
            for line in data[:whole].splitlines():
                self._take(page, line)
        return page

    def _take(self, page: _Page, line: bytes) -> None:
        fields = line.split()
        if len(fields) != 7 or not all(map(bytes.isdigit, fields[3:])):
            return
        key, digest = fields[0].decode("ascii", "replace"), fields[1].decode("ascii", "replace")
        if fields[2] == self._boot.encode():
            inode, size, mtime, ctime = map(int, fields[3:])
            page.notes[key] = (digest, (inode, size, mtime, ctime))
        else:
            page.notes.setdefault(key, (digest, None))

    def _tidy(self, name: str, most: int) -> None:
        """Leave out old lines and shards that are gone, if fewer than `most` notes are left then."""
        page = self._read(name)
        gone = [key for key in page.notes if self._shards and not os.path.exists(f"{self._shards}/{name}/{key}.arrow")]
        for key in gone:
            del page.notes[key]
        if len(page.notes) >= most:
            return
        lines = [
            f"{key} {digest} {self._boot if stamp else 'before'} {' '.join(map(str, stamp or (0, 0, 0, 0)))}\n"
            for key, (digest, stamp) in page.notes.items()
        ]
        scratch = self._folder / f".{name}.{secrets.token_hex(4)}"
        try:
            scratch.write_text("".join(lines))
            os.replace(scratch, self._folder / name)
        except OSError:
            scratch.unlink(missing_ok=True)


_ALL: dict[Path, Seen] = {}


def seen_of(home: Path) -> Seen:
    """This process's notes of the store at `home`."""
    return _ALL.get(home) or _ALL.setdefault(home, Seen(home / "seen", home / "shards"))


os.register_at_fork(after_in_child=_ALL.clear)  # a thread of the parent may have held a lock
