"""A coordinator's journal on the disk of its node: taken over from those before it, appended to, made shorter.

    <home>/coordinator/<epoch>-<coordinator>.journal

Each coordinator writes a file of its own, so one that has been replaced and does not know it spoils nothing. A new one
reads all of them, writes what they say together into its own, and removes those of processes that are gone. Of another
cluster that is alive, or of another kind (embedded in a process or not), it leaves them where they are.

A line is on the disk (fsync) when `put` returns; what a crash tore is the last line, which nobody believes. A shorter
journal replaces the longer one by a rename. Raises a StoreError where the disk does not take it.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path

from crucible.cache.disk import disk_errors, fsync_folder
from crucible.cache.owner import Owner
from crucible.cache.store import Store
from crucible.cluster.journal import (
    Cell,
    Cells,
    Header,
    Page,
    Value,
    cell_line,
    compact,
    from_lines,
    header_line,
    highest,
    merge,
    notes,
    parse,
    to_lines,
    told,
)
from crucible.failpoints import reach
from crucible.workers.fencing import FOLDER, Epoch

log = logging.getLogger("crucible.coordinator")

SLACK = 4
"""A journal is made shorter when it has so many times more lines than cells, and more than `LEAST_LINES`; or when there
are `GROWTH` times more cells than after the last time: jobs of few lines, as all are that find everything done."""
GROWTH = 2
LEAST_LINES = 256
SUFFIX = ".journal"
DRAFT_KEPT_S = 3600.0
"""A draft that is older was left behind by a kill: to write one takes no second."""
UNKNOWN_KEPT_S = 7 * 86_400.0
"""A journal of a process that cannot be proven dead (another host's, from before a reboot), once it is taken over."""


class Logbook:
    """The journal of one coordinator.

    Concurrency: any method from any thread.
    """

    def __init__(self, store: Store, cluster: str, *, embedded: bool) -> None:
        """Read what is there. Nothing is written before `begin`."""
        self._store = store
        self._folder = store.home / FOLDER
        self._header = Header(cluster, embedded, Owner.current())
        self._lock = threading.RLock()
        self._file: FileIO | None = None
        self._path: Path | None = None
        self._epoch = Epoch(cluster, 0, "")
        self._number = 0
        self._lines = self._kept = 0
        self._cells: dict[str, Cell] = {}
        self._others: list[Path] = []
        with store.lock("coordinator"):
            self._read()

    @property
    def cells(self) -> Cells:
        """All that is known, as it is now."""
        with self._lock:
            return dict(self._cells)

    @property
    def highest(self) -> int:
        """The latest epoch that the journal knows of."""
        with self._lock:
            return highest(self._cells)

    def begin(self, epoch: Epoch) -> None:
        """Write the journal of this epoch, with all that is known. Those that it was taken from are then removed."""
        with self._lock, self._store.lock("coordinator"):
            self._read()  # somebody may have taken them over since
            self._epoch = epoch
            self._path = self._folder / f"{epoch.number}-{epoch.coordinator}{SUFFIX}"
            self._rewrite()
            for path in self._others:
                path.unlink(missing_ok=True)
            self._others = []
            _sweep(self._folder)

    def put(self, name: str, value: Value | None) -> None:
        """Say that the cell `name` is `value` from now on. On the disk when this returns."""
        with self._lock:
            self._number += 1
            cell = Cell((self._epoch.number, self._number, self._epoch.coordinator), value)
            ((name, cell),) = from_lines(to_lines({name: cell})).items()  # as it will be read
            self._append(name, cell)
            self._cells[name] = cell
            self._shorten()

    def note(self, kind: str, key: str, record: Value | None) -> None:
        """A standing order: what is so until it is said otherwise (None), whichever coordinator there is."""
        self.put(f"{kind}/{key}", record)

    def notes(self, kind: str) -> dict[str, Value]:
        """The standing orders of a kind, by key."""
        return notes(self.cells, kind)

    def learn(self, lines: bytes) -> bool:
        """What others were told (`told`): of each cell the later one counts from now on. True if anything was new.

        It counts also where the disk does not take it (StoreError); the next word writes all of it.
        """
        with self._lock:
            learned = merge(self._cells, from_lines(lines).items())
            fresh = [name for name, cell in learned.items() if self._cells.get(name) != cell]
            self._number += bool(fresh)
            self._cells = learned
            for name in fresh:
                self._append(name, learned[name])
            self._shorten()
            return bool(fresh)

    def told(self) -> tuple[int, bytes]:
        """(number, what every node should know; see `journal.told`): what has a higher number is newer."""
        with self._lock:
            return self._number, to_lines(told(self._cells))

    def close(self) -> None:
        """Let go of the file; the next word opens one again."""
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                file.close()

    # --- the file

    def _append(self, name: str, cell: Cell) -> None:
        if self._path is None:
            return  # `begin` writes it
        reach("journal.before")
        with disk_errors(self._path):
            if self._file is None or os.fstat(self._file.fileno()).st_nlink == 0:
                self._rewrite()  # somebody emptied the store under us, or a line before this one is torn
            assert self._file is not None
            try:
                _write(self._file, cell_line(name, cell))
                reach("journal.torn")
                _write(self._file, b"\n")
                os.fsync(self._file.fileno())
            except BaseException:
                self.close()
                raise
        self._lines += 1
        reach("journal.after")

    def _shorten(self) -> None:
        cells = len(self._cells)
        long = self._lines > max(LEAST_LINES, SLACK * cells) or cells > GROWTH * max(LEAST_LINES, self._kept)
        if self._path is not None and long:
            self._rewrite()

    def _rewrite(self) -> None:
        assert self._path is not None
        self._cells = compact(self._cells)
        draft = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        with disk_errors(self._path):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                with draft.open("wb") as whole:
                    whole.write(header_line(self._header) + to_lines(self._cells))
                    whole.flush()
                    os.fsync(whole.fileno())
                reach("journal.compacting")
                draft.replace(self._path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
            fsync_folder(self._folder)
            self.close()
            self._file = self._path.open("ab", buffering=0)
        self._lines = self._kept = len(self._cells)

    def _read(self) -> None:
        """Take in all journals that are ours to take over, and note those that nobody needs then."""
        self._others = []
        for path, page in pages(self._store.home):
            fate = page.header.owner.fate()
            ours = page.header.cluster == self._header.cluster
            if page.header.embedded != self._header.embedded or (not ours and fate == "alive"):
                continue
            if page.damaged:
                log.warning("%s: %d lines are damaged and left out", path, page.damaged)
            self._cells = merge(self._cells, page.cells.items())
            if path != self._path and (fate == "dead" or (fate == "unknown" and _age_s(path) > UNKNOWN_KEPT_S)):
                self._others.append(path)


def pages(home: Path) -> list[tuple[Path, Page]]:
    """The journals of a store that can be read, by name."""
    found = []
    for path in sorted((home / FOLDER).glob(f"[!.]*{SUFFIX}")):
        with suppress(OSError):
            page = parse(path.read_bytes())
            if page is None:
                log.warning("%s: not a journal that this crucible reads; left where it is", path)
            else:
                found.append((path, page))
    return found


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) or 0 :]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _sweep(folder: Path) -> None:
    for path in folder.glob(f".*{SUFFIX}.*"):
        if _age_s(path) > DRAFT_KEPT_S:
            with suppress(OSError):
                path.unlink()
