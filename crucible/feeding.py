"""The threads that fetch shards ahead for a `Feeder`, and what they share. No file and no socket: a source has those.

A thread fetches one shard after the other while there is one to fetch and room for it in the budget, and then ends; so
none waits for work. What a reader waits for gets a thread of its own at once.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from crucible.manifest import Manifest
from crucible.patience import Patience
from crucible.refs import ShardInfo
from crucible.sources import FeedingSource, WishingSource
from crucible.stopping import LOOK_S, Stopped

LOOK_AHEAD = 1024
"""Shards looked at before they are needed, those on this disk included: a look costs 3 us."""
LOOK_HERE = 8
"""Shards on this disk that are passed at one look; the next look goes on. What comes next has to be computed: for all
of 300 shards of 25,000 rows that took 79 ms before the first row, though all were here."""
QUEUED = 64
"""Shards that are known to be missing and wait for a thread or for room. A prefetch hears of them (`wish`)."""
PASSED = 2048
"""A shard that was not opened when one so many places later is will not be: what it kept of the budget is free again.
A reader opens the shards of a block, at most as many, in any order."""
CLOSE_S = 5.0
"""How long `close` waits for threads. One that hangs on a dead socket ends with its timeout, and touches nothing."""
_log = logging.getLogger("crucible.feed")


Wanted = tuple[Manifest, ShardInfo]


@dataclass(eq=False, slots=True)
class _Fetch:
    """A shard on its way. What was fetched is in the store; here is only whether it is over, and how."""

    manifest: Manifest
    shard: ShardInfo
    ahead: bool
    """Begun before anybody asked for it, and counted in the budget."""
    over: threading.Event = field(default_factory=threading.Event)
    path: Path | None = None
    error: BaseException | None = None
    started: bool = False
    left: bool = False
    """Everybody who asked for it has gone away."""
    waiting: int = 0


@dataclass(eq=False, slots=True)
class _Seen:
    """A shard of the sequence that was looked at and not opened yet."""

    place: int
    manifest: Manifest
    shard: ShardInfo
    state: Literal["here", "queued", "fetching", "fetched", "left"]
    """`left`: to the reader, because it failed or is bigger than the budget."""


class Feeding:
    """What threads share. Holds no feeder, so that one that is forgotten can go while its threads still run."""

    def __init__(self, source: FeedingSource, most_bytes: int, fetchers: int) -> None:
        self.source, self.most_bytes, self._fetchers = source, most_bytes, fetchers
        self.lock = threading.Lock()
        self.stopped = False
        self.bytes_ahead = 0
        self._wanted: Iterator[Wanted] | None = None
        self._places = 0
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._queue: OrderedDict[str, _Seen] = OrderedDict()
        self._under_way: dict[str, _Fetch] = {}
        self._threads: set[threading.Thread] = set()
        self._ahead_threads = 0

    # --- what readers do

    def want(self, shards: Iterator[Wanted]) -> None:
        _remember(self)
        with self.lock:
            if self.stopped:
                return
            while self._seen:
                self._forget(next(iter(self._seen)))
            self._wanted = shards
            self._go_on()

    def opened(self, key: str) -> None:
        with self.lock:
            found = self._seen.get(key)
            if found is not None:
                self._forget(key)
                while self._seen and (oldest := next(iter(self._seen.values()))).place < found.place - PASSED:
                    self._forget(oldest.shard.key)
            elif len(self._seen) >= LOOK_AHEAD:  # it reads what lies further on, and not what was looked at
                self._forget(next(iter(self._seen)))
            else:
                return
            self._go_on()

    def wait(self, manifest: Manifest, shard: ShardInfo, patience: Patience) -> Path:
        """The path of a shard that is not here: of the fetch that is under way, else of one begun now."""
        _remember(self)
        while True:
            with self.lock:
                if self.stopped:
                    break
                fetch = self._under_way.get(shard.key)
                if fetch is None:
                    fetch = self._under_way[shard.key] = _Fetch(manifest, shard, ahead=False)
                fetch.waiting += 1
            try:
                if not self._begun(fetch):
                    break
                # a shard of a big file is there long before the file's last one, and maybe by another process
                while not fetch.over.wait(LOOK_S):
                    if self.source.has(shard):
                        patience.over()
                        return self.source.path(manifest, shard)
                    patience.look()
            except BaseException:  # Ctrl-C: what only this thread wanted ends as well
                with self.lock:
                    fetch.left = not fetch.ahead and fetch.waiting == 1
                    if not fetch.started:
                        self._drop(fetch)
                raise
            finally:
                with self.lock:
                    fetch.waiting -= 1
            if fetch.path is not None:
                patience.over()
                return fetch.path
            if not fetch.ahead and fetch.error is not None and not isinstance(fetch.error, Stopped):
                raise fetch.error
            # it was begun ahead, or had been given up: now somebody asks
        return self.source.path(manifest, shard)  # closed, or a process that may start no more threads

    def shed(self) -> None:
        """There is no room on the disk: give up what was fetched ahead, and fetch nothing ahead any more."""
        with self.lock:
            self.most_bytes = 0
            self._let_go()

    def stop(self) -> None:
        """Let everything end. From a destructor too, so it waits for nothing."""
        self.stopped = True
        if self.lock.acquire(blocking=False):  # else a thread has it, and looks when it is next done
            try:
                self._let_go()
            finally:
                self.lock.release()

    def close(self) -> None:
        self.stop()
        with self.lock:
            self._let_go()
            threads = tuple(self._threads)
        end = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    # --- with the lock held

    def _go_on(self) -> None:
        """Look further, and see to it that there are threads for what is found."""
        self._look()
        while not self.stopped and self._ahead_threads < self._fetchers and (fetch := self._next()) is not None:
            if not self._start(fetch):
                self.bytes_ahead -= fetch.shard.size
                return
            self._ahead_threads += 1

    def _look(self) -> None:
        news, passed = False, 0
        while (
            self._wanted is not None
            and len(self._seen) < LOOK_AHEAD
            and len(self._queue) < QUEUED
            and passed < LOOK_HERE
        ):
            try:
                manifest, shard = next(self._wanted)
            except StopIteration:
                self._wanted = None
                break
            except Exception:  # noqa: BLE001 - the caller's own sequence
                self._wanted = None
                _log.exception("the order of the shards to fetch ahead cannot be had; each is fetched when it is read")
                break
            self._places += 1
            if shard.key in self._seen:
                continue
            here = self.source.has(shard)
            passed += here
            state: Any = "here" if here else "queued" if shard.size <= self.most_bytes else "left"
            self._seen[shard.key] = seen = _Seen(self._places, manifest, shard, state)
            if state == "queued":
                self._queue[shard.key] = seen
                news = True
        if news and isinstance(self.source, WishingSource):
            self.source.wish([(seen.manifest, seen.shard) for seen in self._queue.values()])

    def _next(self) -> _Fetch | None:
        """The first shard of the queue, unless there is no room for it."""
        while self._queue:
            key, seen = next(iter(self._queue.items()))
            if self.bytes_ahead + seen.shard.size > self.most_bytes:
                return None
            del self._queue[key]
            if key in self._under_way:  # somebody waits for it already
                seen.state = "left"
                continue
            seen.state = "fetching"
            self.bytes_ahead += seen.shard.size
            fetch = self._under_way[key] = _Fetch(seen.manifest, seen.shard, ahead=True)
            return fetch
        return None

    def _begun(self, fetch: _Fetch) -> bool:
        """Fetch what a reader waits for, before everything else. False: the reader has to do so itself."""
        with self.lock:
            if fetch.started or fetch.over.is_set():
                return True
            if self._queue.pop(fetch.shard.key, None) is not None:
                self._seen[fetch.shard.key].state = "left"
            return self._start(fetch)

    def _start(self, fetch: _Fetch) -> bool:
        """False if the process may start no thread any more, because it ends."""
        thread = threading.Thread(target=_run, args=(self, fetch), name="crucible-feed", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._threads.discard(thread)
            self._drop(fetch)
            return False
        fetch.started = True
        return True

    def _drop(self, fetch: _Fetch) -> None:
        """It was not started: whoever waits for it begins again."""
        if self._under_way.get(fetch.shard.key) is fetch:
            del self._under_way[fetch.shard.key]
        fetch.left = True
        fetch.over.set()

    def _forget(self, key: str) -> None:
        """It was opened, or will not be: what it kept of the budget is free."""
        seen = self._seen.pop(key)
        self._queue.pop(key, None)
        if seen.state == "fetched":
            self.bytes_ahead -= seen.shard.size
            self.source.holds.release(key)

    def _let_go(self) -> None:
        self._wanted = None
        while self._seen:
            self._forget(next(iter(self._seen)))

    # --- what threads do

    def fetch(self, fetch: _Fetch) -> None:
        """Bring one shard. Never raises: the error is for whoever waits."""
        key, size = fetch.shard.key, fetch.shard.size
        self.source.holds.hold(key)
        try:
            fetch.path = self.source.path(fetch.manifest, fetch.shard, lambda: self.stopped or fetch.left)
        except BaseException as error:  # noqa: BLE001
            fetch.error = error
        with self.lock:
            if self._under_way.get(key) is fetch:
                del self._under_way[key]
            seen = self._seen.get(key) if fetch.ahead else None
            if seen is not None and seen.state == "fetching" and fetch.path is not None and not self.stopped:
                seen.state = "fetched"  # it stays leased, and counted
            else:
                if seen is not None and seen.state == "fetching":
                    seen.state = "left"
                if fetch.ahead:
                    self.bytes_ahead -= size
                self.source.holds.release(key)
        fetch.over.set()

    def after(self, fetch: _Fetch) -> _Fetch | None:
        """What the thread does next; None: it ends."""
        with self.lock:
            if self.stopped:
                self._let_go()
            elif fetch.ahead:
                self._look()
                if (following := self._next()) is not None:
                    following.started = True  # by this very thread
                    return following
            self._ahead_threads -= fetch.ahead
            self._threads.discard(threading.current_thread())
            return None

    # --- processes

    def forked(self) -> None:
        """In a child: threads, leases and what was on its way are the parent's."""
        self.lock = threading.Lock()
        self._threads, self._ahead_threads, self.bytes_ahead = set(), 0, 0
        self._under_way = {}
        for key, seen in reversed(self._seen.items()):
            if seen.state == "fetching":
                seen.state = "queued"
                self._queue[key] = seen
                self._queue.move_to_end(key, last=False)
            elif seen.state == "fetched":
                seen.state = "here"


def _run(state: Feeding, fetch: _Fetch | None) -> None:
    while fetch is not None:
        state.fetch(fetch)
        fetch = state.after(fetch)


# --- processes that end, and that fork

_LIVE: weakref.WeakSet[Feeding] = weakref.WeakSet()
"""States that have had threads."""
_LIVE_LOCK = threading.Lock()


def _remember(state: Feeding) -> None:
    with _LIVE_LOCK:
        _LIVE.add(state)


def _all() -> list[Feeding]:
    with _LIVE_LOCK:
        return list(_LIVE)


def _end() -> None:
    states = _all()
    for state in states:
        state.stop()
    for state in states:
        state.close()


_FORKING: list[Feeding] = []


def _before_fork() -> None:
    # with every lock here, no thread is inside the caller's sequence: a generator that is copied while it runs never
    # runs again
    _LIVE_LOCK.acquire()
    for state in list(_LIVE):
        state.lock.acquire()
        _FORKING.append(state)


def _in_parent() -> None:
    while _FORKING:
        _FORKING.pop().lock.release()
    _LIVE_LOCK.release()


def _in_child() -> None:
    global _LIVE_LOCK
    _LIVE_LOCK = threading.Lock()
    while _FORKING:
        _FORKING.pop().forked()
    _LIVE.clear()


atexit.register(_end)
os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
