"""What was asked of a coordinator goes on and comes to its end, whatever becomes of the telling of it. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crucible.cache.store import Store
from crucible.cluster.agents import Agents
from crucible.cluster.jobs import Job, Jobs
from crucible.cluster.logbook import Logbook
from crucible.cluster.remembered import accepted
from crucible.cluster.remembering import Memory
from crucible.cluster.running import Runner
from crucible.cluster.turns import Turn
from crucible.config import Settings
from crucible.errors import ClusterError, StaleCoordinator
from crucible.refs import DataRequest, RepoRef
from crucible.report import Progress
from crucible.workers.fencing import Epoch
from crucible.workers.tasks import JobOptions

REQUEST = DataRequest(RepoRef("org/chat", "main"), "main", "train")
OPTIONS = JobOptions.of(Settings(Path("/home")))
EPOCH = Epoch("session", 3, "me")
WAIT_S = 30.0


class Runs:
    """Jobs that end at once, with an error that says that they ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, job: str, record: Job, *_: Any) -> None:
        self.ran.append(job)
        record.error = ClusterError(f"{job} ran")
        record.progress = Progress(job, "failed")


Opened = Callable[..., tuple[Memory, Runs, Logbook]]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """`opened(tell)`: what a coordinator remembers, whose nodes hear of it by `tell`; its jobs and its journal."""
    books: list[Logbook] = []

    def open_one(tell: Callable[..., None]) -> tuple[Memory, Runs, Logbook]:
        book = Logbook(Store(tmp_path), "session", embedded=False)
        books.append(book)
        book.begin(EPOCH)
        agents = SimpleNamespace(turn=Turn(EPOCH), tell=tell)
        memory, runs = Memory(book, cast("Agents", agents), Jobs(), embedded=False), Runs()
        memory.runner = cast("Runner", runs)
        return memory, runs, book

    yield open_one
    for book in books:
        book.close()


def value(**changes: Any) -> dict[str, Any]:
    made = accepted(REQUEST, OPTIONS, 2, None, token=False, epoch=EPOCH, embedded=False, now=1.5)
    return {**made, **changes}


@pytest.mark.parametrize("error", [RuntimeError("the object store is full"), StaleCoordinator("node a", 3, 4)])
def test_a_job_ends_for_whoever_waits_also_where_nobody_could_be_told(opened: Opened, error: Exception) -> None:
    told = 0

    def tell(*_: Any) -> None:
        nonlocal told
        told += 1
        if told > 1:
            raise error

    memory, _, book = opened(tell)
    memory.accept("job", REQUEST, OPTIONS, 1, None, None)
    assert str(memory.outcome("job", WAIT_S)) == "job ran"
    assert book.notes("job")["job"]["phase"] == "failed", "the end is in the journal"
    assert told == 2


def test_a_job_begins_also_where_nobody_could_be_told(opened: Opened) -> None:
    def tell(*_: Any) -> None:
        raise RuntimeError("the object store is full")

    memory, runs, _ = opened(tell)
    memory.accept("job", REQUEST, OPTIONS, 1, None, None)
    assert str(memory.outcome("job", WAIT_S)) == "job ran"
    assert runs.ran == ["job"]


def test_a_job_that_is_not_understood_holds_up_no_other(opened: Opened) -> None:
    memory, runs, book = opened(lambda *_: None)
    for name, lacks in (("a", "phase"), ("b", "request"), ("c", "token"), ("d", "")):
        book.put(f"job/{name}", {key: one for key, one in value().items() if key != lacks})
    memory.resume()
    assert memory.known.is_set()
    assert str(memory.outcome("d", WAIT_S)) == "d ran"
    assert runs.ran == ["d"]


def test_a_job_that_lacks_a_word_ends_with_an_error_that_names_it(opened: Opened) -> None:
    memory, runs, book = opened(lambda *_: None)
    book.put("job/a", {key: one for key, one in value().items() if key != "replicas"})
    memory.resume()
    assert "job a" in str(memory.outcome("a", WAIT_S))
    assert runs.ran == []


def test_what_is_learned_while_what_was_known_goes_on_goes_on_as_well(opened: Opened, tmp_path: Path) -> None:
    other = Logbook(Store(tmp_path / "other"), "session", embedded=False)
    other.begin(Epoch("session", 2, "before"))
    other.put("job/b", value())
    late = [other.told()[1]]
    other.close()

    def tell(*_: Any) -> None:
        if late:
            memory.learn(late.pop())

    memory, runs, book = opened(tell)
    book.put("job/a", value())
    memory.resume()
    assert str(memory.outcome("b", WAIT_S)) == "b ran"
    assert str(memory.outcome("a", WAIT_S)) == "a ran"
    assert sorted(runs.ran) == ["a", "b"], "each once"
