"""The journal on a disk: what was put is there after any kill, and a coordinator takes over those before it."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crucible.cache.store import Store
from crucible.cluster.journal import JOBS_KEPT
from crucible.cluster.logbook import GROWTH, LEAST_LINES, SUFFIX, Logbook, pages
from crucible.errors import StoreError
from crucible.workers.fencing import FOLDER, Epoch

Opener = Callable[..., Logbook]

OTHER = """
import sys
from pathlib import Path
from crucible.cache.store import Store
from crucible.cluster.logbook import Logbook
from crucible.workers.fencing import Epoch
home, cluster, number, embedded = sys.argv[1:]
book = Logbook(Store(Path(home)), cluster, embedded=embedded == "yes")
book.begin(Epoch(cluster, int(number), "other"))
count = 0
while True:
    count += 1
    book.put(f"job/{number}-{count % 50}", {"phase": "items", "count": count})
    print(count, flush=True)
"""


@pytest.fixture
def opened() -> Iterator[Opener]:
    """`opened(home, epoch, cluster, embedded=...)`: the journal of a coordinator that has just begun."""
    books: list[Logbook] = []

    def open_one(home: Path, number: int = 0, cluster: str = "here", *, embedded: bool = False) -> Logbook:
        books.append(Logbook(Store(home), cluster, embedded=embedded))
        books[-1].begin(Epoch(cluster, number or books[-1].highest + 1, f"c{number}"))
        return books[-1]

    yield open_one
    for book in books:
        book.close()


def journals(home: Path) -> list[str]:
    return sorted(path.name for path in (home / FOLDER).iterdir() if SUFFIX in path.name)


@contextmanager
def another(
    home: Path, number: int, cluster: str = "here", *, embedded: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process that puts one job after another, and says so of each."""
    command = [sys.executable, "-c", OTHER, str(home), cluster, str(number), "yes" if embedded else "no"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def said(process: subprocess.Popen[str], lines: int) -> int:
    """The last count of so many lines more."""
    assert process.stdout is not None
    return [int(process.stdout.readline()) for _ in range(lines)][-1]


def test_what_a_killed_coordinator_had_put_is_known_to_the_next_whose_journal_replaces_its(
    tmp_path: Path, opened: Opener
) -> None:
    with another(tmp_path, 1) as process:
        count = said(process, 120)
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        count = max([count, *map(int, process.stdout.read().split())])
    book = opened(tmp_path)
    known = {json.loads(json.dumps(cell.value))["count"] for cell in book.cells.values() if cell.value}
    assert max(known) in (count, count + 1), "the last may be on the disk and not have been said"
    assert known >= set(range(count - 48, count + 1))
    assert journals(tmp_path) == ["2-c0.journal"]
    assert set(book.cells) == {f"job/1-{n}" for n in range(50)}


def test_a_living_cluster_keeps_its_journal_and_one_that_was_embedded_is_for_its_own_kind(
    tmp_path: Path, opened: Opener
) -> None:
    with another(tmp_path, 4, "elsewhere") as alive, another(tmp_path, 5, "inside", embedded=True) as inside:
        said(alive, 1), said(inside, 1)
        assert opened(tmp_path).cells == {}
        assert opened(tmp_path, 6, cluster="inside", embedded=True).notes("job"), "its own, whoever writes it now"
        assert len(journals(tmp_path)) == 4
    book = opened(tmp_path)
    assert book.highest == 4
    assert all(name.startswith("job/4-") for name in book.cells)
    assert any(name.startswith("5-other") for name in journals(tmp_path))


def test_a_journal_whose_store_was_emptied_is_written_again_with_the_next_word(tmp_path: Path, opened: Opener) -> None:
    book = opened(tmp_path)
    book.put("job/a", {"phase": "items"})
    shutil.rmtree(tmp_path / FOLDER)
    book.note("drain", "n1", {"grace": 5})
    assert [page.cells for _, page in pages(tmp_path)] == [book.cells]
    assert book.notes("drain") == {"n1": {"grace": 5}}


def test_a_journal_stays_short_however_much_is_put(tmp_path: Path, opened: Opener) -> None:
    book = opened(tmp_path)
    for number in range(2 * LEAST_LINES):
        book.put(f"job/{number % 3}", {"phase": "items", "count": number})
    for number in range(JOBS_KEPT + 9):
        book.put(f"job/old-{number}", {"phase": "finished"})
    (path,) = (tmp_path / FOLDER).glob(f"*{SUFFIX}")
    assert path.read_bytes().count(b"\n") < 2 * LEAST_LINES
    again = opened(tmp_path)
    assert [again.cells[f"job/{n % 3}"].value for n in range(509, 512)] == [
        {"phase": "items", "count": number} for number in range(509, 512)
    ]
    assert "job/old-0" not in again.cells
    assert f"job/old-{JOBS_KEPT + 8}" in again.cells


def test_jobs_that_find_everything_done_are_forgotten_as_well(tmp_path: Path, opened: Opener) -> None:
    """They put few lines each, so that the lines alone never get many more than the jobs."""
    book, jobs = opened(tmp_path), 3 * JOBS_KEPT
    for number in range(jobs):
        book.put(f"job/{number}", {"phase": "finished"})
    assert len(book.cells) <= GROWTH * LEAST_LINES
    assert f"job/{jobs - 1}" in book.cells
    (path,) = (tmp_path / FOLDER).glob(f"*{SUFFIX}")
    assert path.read_bytes().count(b"\n") <= GROWTH * LEAST_LINES + 1


@pytest.mark.parametrize("room", [1, 30, 500])
def test_a_disk_that_takes_half_a_line_is_named_and_costs_that_line_only(
    tmp_path: Path, opened: Opener, room: int
) -> None:
    book = opened(tmp_path)
    book.put("job/a", {"phase": "items"})
    (path,) = (tmp_path / FOLDER).glob(f"*{SUFFIX}")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, before[1]))
    try:
        with pytest.raises(StoreError, match=SUFFIX):
            book.put("job/b", {"phase": "items", "long": "x" * 1000})
        with pytest.raises(StoreError, match=SUFFIX):
            book.put("job/b", {"phase": "items", "long": "x" * 1000})
        assert [name for _, page in pages(tmp_path) for name in page.cells] == ["job/a"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "job/b" not in book.cells
    book.put("job/c", {"phase": "items"})
    assert [sorted(page.cells) for _, page in pages(tmp_path)] == [["job/a", "job/c"]]
    assert [page.damaged for _, page in pages(tmp_path)] == [0]
    assert [name for name in (tmp_path / FOLDER).iterdir() if name.name.startswith(".")] == []


def test_what_others_were_told_counts_also_while_the_disk_is_full(tmp_path: Path, opened: Opener) -> None:
    teller, book = opened(tmp_path / "one", 3), opened(tmp_path / "two", 7)
    teller.put("job/a", {"phase": "items", "long": "x" * 1000})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(StoreError):
            book.learn(teller.told()[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert book.notes("job").keys() == {"a"}
    book.put("job/b", {"phase": "items"})
    assert opened(tmp_path / "two").notes("job").keys() == {"a", "b"}


def test_what_others_were_told_counts_where_it_is_later(tmp_path: Path, opened: Opener) -> None:
    old, new = opened(tmp_path / "one", 3), opened(tmp_path / "two", 7)
    old.put("job/a", {"phase": "items"})
    old.note("drain", "n1", {"grace": 1})
    new.put("job/a", {"phase": "copies"})
    assert new.learn(old.told()[1])
    assert not new.learn(old.told()[1]), "nothing of it is new"
    assert new.notes("job") == {"a": {"phase": "copies"}}
    assert new.notes("drain") == {"n1": {"grace": 1}}
    assert opened(tmp_path / "two").cells == new.cells, "what was learned is on the disk as well"
    numbers = [new.told()[0], new.note("drain", "n1", None), new.told()[0]]
    assert numbers[0] < numbers[2]
