"""Work done ahead of whoever consumes it: by the threads of this process, in order, within a bound on memory.

The threads are there while anybody consumes, and gone afterwards. They are few: as many as the process' share of the
node's cores, however many datasets it reads at once.

Concurrency: any number of threads of the process may consume, each its own iterator. A process that was forked in the
middle of an iteration does the work of its copy of the iterator itself: threads do not survive a fork, and the locks
they held would never open.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from crucible.config import decoders
from crucible.images import Claim, unbounded

T = TypeVar("T")
Job = Callable[[Claim], T]
"""What is to be done. It tells the claim how much memory its result takes before it takes it."""

MOST_BYTES = 128 << 20
"""Most that lies ready, or in the making, in a process: 512 images of 256 pixels a side, or 32 of 1,024."""

MOST_AHEAD = 512
"""Most jobs begun ahead of the consumer; what they have not unpacked yet is in memory as well."""

_NEW, _BEGUN, _DONE = range(3)
_EXIT_S = 5.0


class _Closed(Exception):
    """The consumer is gone: the job is given up."""


class _Task:
    __slots__ = ("error", "job", "lane", "result", "size", "state")

    def __init__(self, job: Job[Any], lane: _Lane) -> None:
        self.job, self.lane = job, lane
        self.state = _NEW
        self.result: Any = None
        self.error: BaseException | None = None
        self.size = 0
        """Bytes claimed so far."""


class _Lane:
    """The jobs of one consumer, in its order. The first of them is always let in, so nothing waits for ever."""

    __slots__ = ("closed", "tasks")

    def __init__(self) -> None:
        self.tasks: deque[_Task] = deque()
        self.closed = False


class Pool:
    """Threads that do jobs in the order in which they were given. They start with the first lane, end with the last."""

    def __init__(self, threads: int, most_bytes: int = MOST_BYTES) -> None:
        self.pid = os.getpid()
        self.threads = threads
        self._most_bytes = most_bytes
        self._lock = threading.RLock()  # re-entrant: a collection may end an abandoned iterator in the middle of it
        self._work = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._queue: deque[_Task] = deque()
        self._lanes = 0
        self._running: list[threading.Thread] = []
        self._held = 0
        self._ended = False
        self._waiting = 0
        """Jobs that wait for room."""

    @property
    def held(self) -> int:
        """Bytes claimed by what is in the making or lies ready."""
        return self._held

    def in_order(self, jobs: Iterable[Job[T]]) -> Generator[T, None, None]:
        """The results of `jobs`, in their order; the error of a job in its place. `jobs` is drawn on by the caller."""
        if not self.threads:
            yield from (job(unbounded) for job in jobs)
            return
        lane: _Lane = _Lane()
        source = iter(jobs)
        self._open()
        try:
            self._give(lane, source, 2 * self.threads)
            while lane.tasks:
                yield self._take(lane)
                if os.getpid() != self.pid:
                    yield from _alone(lane, source)
                    return
                if not lane.tasks or not (self._waiting or self._held >= self._most_bytes):
                    # Two for each result: what is ready need not wait until all that may be ahead was asked for.
                    self._give(lane, source, min(2, MOST_AHEAD - len(lane.tasks)))
        finally:
            if os.getpid() == self.pid:
                self._close(lane)

    # --- the consumer ---

    def _give(self, lane: _Lane, source: Iterator[Job[Any]], count: int) -> None:
        for _ in range(count):
            try:
                task = _Task(next(source), lane)
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - it has its place: after the results of the jobs before it
                task = _Task(_nothing, lane)
                task.state, task.error = _DONE, error
                source = iter(())
            with self._lock:
                lane.tasks.append(task)
                if task.state == _NEW:
                    self._queue.append(task)
                    self._work.notify()

    def _take(self, lane: _Lane) -> Any:
        task = lane.tasks[0]
        with self._lock:
            mine = task.state == _NEW
            task.state = _BEGUN if mine else task.state
        if mine:  # no thread has come to it: waiting for one would take no less time
            self._do(task)
        with self._lock:
            while task.state != _DONE:
                self._done.wait()
            lane.tasks.popleft()
            self._held -= task.size
            self._room.notify_all()  # there is room, and another task is the first of its lane
        if task.error is not None:
            raise task.error
        return task.result

    def _open(self) -> None:
        with self._lock:
            self._lanes += 1
            self._running = [thread for thread in self._running if thread.is_alive()]
            while len(self._running) < self.threads:
                thread = threading.Thread(target=self._run, name="crucible-decode", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread can be had: the consumer does it all
                    thread.start()
                    self._running.append(thread)
                    continue
                break

    def _close(self, lane: _Lane) -> None:
        with self._lock:
            lane.closed = True
            self._lanes -= 1
            self._held -= sum(task.size for task in lane.tasks if task.state == _DONE)
            lane.tasks.clear()
            self._queue = deque(task for task in self._queue if not task.lane.closed)
            self._room.notify_all()
            self._work.notify_all()

    def end(self) -> None:
        """For good: wait until no thread runs any more, a few seconds at most for one that decodes something big."""
        with self._lock:
            self._ended = True
            self._queue.clear()
            self._work.notify_all()
            self._room.notify_all()
            threads = list(self._running)
        for thread in threads:
            thread.join(_EXIT_S)

    # --- a thread ---

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._queue:
                    if self._ended or not self._lanes:
                        self._running = [one for one in self._running if one is not threading.current_thread()]
                        return
                    self._work.wait()
                try:
                    task = self._queue.popleft()
                except IndexError:
                    continue  # a collection in this very line has closed a lane
                if task.state != _NEW:
                    continue  # its consumer has done it
                task.state = _BEGUN
            self._do(task)
            del task  # not held while it waits for the next

    def _do(self, task: _Task) -> None:
        try:
            task.result = task.job(lambda size: self._claim(task, size))
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            task.error = error
        with self._lock:
            task.state = _DONE
            task.job = _nothing  # what it was made from is not needed any more
            if task.lane.closed:
                self._held -= task.size
                task.result = None
            self._done.notify_all()

    def _claim(self, task: _Task, size: int) -> None:
        with self._lock:
            lane = task.lane
            while not self._gone(lane) and lane.tasks[0] is not task and self._held + size > self._most_bytes:
                self._waiting += 1
                try:
                    self._room.wait()
                finally:
                    self._waiting -= 1
            if self._gone(lane):
                raise _Closed
            self._held += size
            task.size += size

    def _gone(self, lane: _Lane) -> bool:
        return lane.closed or self._ended


def _nothing(_claim: Claim) -> None:
    """The job of a task that is done."""


def _alone(lane: _Lane, source: Iterator[Job[Any]]) -> Iterator[Any]:
    """The rest of a lane in a process that has its iterator, but not its threads."""
    while lane.tasks:
        task = lane.tasks.popleft()
        if task.state == _DONE:
            if task.error is not None:
                raise task.error
            yield task.result
        else:
            yield task.job(unbounded)
    for job in source:
        yield job(unbounded)


_pool: Pool | None = None


def process_pool() -> Pool:
    """The pool of this process, made when it is first asked for.

    A DataLoader worker has its part of the rank's threads, and is one of them itself: alone it decodes without any.
    """
    global _pool
    if _pool is None or _pool.pid != os.getpid():
        workers = loader_workers()
        _pool = Pool(decoders() if workers is None else max(0, decoders() // workers - 1))
    return _pool


def loader_workers() -> int | None:
    """How many workers the torch DataLoader has that this process is one of, else None. Never imports torch."""
    torch_data = sys.modules.get("torch.utils.data")
    info = None if torch_data is None else torch_data.get_worker_info()
    return None if info is None else int(info.num_workers)


def _end() -> None:
    """Before the interpreter takes down what the threads stand on."""
    if _pool is not None and _pool.pid == os.getpid():
        _pool.end()


atexit.register(_end)
