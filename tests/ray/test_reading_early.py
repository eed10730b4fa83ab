"""Reading a split while a prefetch on real raylets brings it: begin early, be served first, outlive a coordinator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible import errors
from crucible.workers.asking import Line
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import Background, file_bytes, until
from tests.ray.test_main_job import children

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

FILES, ROWS = 12, 1200


def texts(first: int) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() * 4 for number in range(first, first + ROWS)]


def files_of(folder: Path) -> dict[str, bytes | Path]:
    """Twelve files of about 320 kB, each an item of its own."""
    folder.mkdir()
    made: dict[str, bytes | Path] = {}
    for number in range(FILES):
        path = folder / f"{number}.parquet"
        table = pa.table({"id": range(number * ROWS, (number + 1) * ROWS), "text": texts(number * ROWS)})
        pq.write_table(table, path, compression="none", use_dictionary=False)
        made[f"data/train-{number:05d}-of-{FILES:05d}.parquet"] = path
    return made


@pytest.fixture
def slow(hub: FaultyHub, tmp_path: Path, start_nodes: Any) -> Iterator[tuple[FaultyHub, Any]]:
    """A Hub that takes four seconds for a file, two nodes that bring one at a time each, and readers on the first."""
    hub.import_files("org/chat", files_of(tmp_path / "data"))
    nodes = start_nodes(2, hub.endpoint, CRUCIBLE_SHARD_BYTES="200000", CRUCIBLE_AHEAD="0")
    hub.add("slow", origin="cdn", piece=4_000, wait=0.05)
    yield hub, nodes
    hub.clear_faults()


def begun(job: Background, hub: FaultyHub) -> None:
    """The job is under way: the first bytes of files have left the Hub."""
    until(lambda: job.seen and hub.bytes_sent() > 50_000)


def asked_for(hub: FaultyHub) -> list[str]:
    """Files in the order in which they were asked for as a whole."""
    whole = (r for r in hub.log if r.origin == "hub" and r.status == 302 and r.range is None)
    return list(dict.fromkeys(record.path.rpartition("/")[2] for record in whole))


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The items that readers of this process asked for, question by question, once the job had heard it."""
    heard: list[Sequence[str]] = []
    ask = Line.wish

    def wish(line: Line, job: str, keys: Sequence[str]) -> Any:
        answer = ask(line, job, keys)
        if keys and answer is not None:
            heard.append(keys)
        return answer

    monkeypatch.setattr(Line, "wish", wish)
    return heard


def test_rows_come_while_the_job_runs_and_what_a_reader_needs_comes_first(
    slow: tuple[FaultyHub, Any], wishes: list[Sequence[str]]
) -> None:
    hub, nodes = slow
    job = Background(nodes.address)
    begun(job, hub)
    # the last file would be the last to come
    tail = iter(crucible.load_dataset("org/chat", split=f"train[{(FILES - 1) * ROWS}:]", streaming=True))
    first = ThreadPoolExecutor(1).submit(next, tail)
    until(lambda: wishes)
    before = len(asked_for(hub))
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    assert not stream.manifest.complete
    rows = iter(stream)
    assert next(rows)["id"] == 0
    assert job.seen[-1].items_done < FILES, "it began before the end"
    last = f"train-{FILES - 1:05d}-of-{FILES:05d}.parquet"
    hub.clear_faults()
    hub.add("slow", origin="cdn", piece=16_000, wait=0.05)  # a fast one would be through before the wish is looked at
    until(lambda: last in asked_for(hub))
    hub.clear_faults()
    assert first.result(90)["id"] == (FILES - 1) * ROWS
    assert [row["id"] for row in rows] == list(range(1, FILES * ROWS))
    report = job.report()
    assert report.rows == FILES * ROWS
    assert report.splits[0].manifest == crucible.load_dataset("org/chat", split="train").manifest.id
    order = asked_for(hub)
    assert len(order) == FILES
    sent = 2 * 2  # items that the two nodes have been given cannot be overtaken; the other reader's come between too
    assert order.index(last) < max(FILES - 3, before + sent + 1)
    footers = FILES * (64 << 10)
    assert file_bytes(hub) <= report.source_bytes + footers, "each byte once, but for the files' ends"
    counts = stream.read_counts()
    assert counts["hub_shards"] == 0
    assert counts["peer_shards"] > 0, "some were made on the other node"


def test_readers_go_on_over_a_coordinators_death_and_end_with_their_jobs_error(
    slow: tuple[FaultyHub, Any], tmp_path: Path
) -> None:
    hub, nodes = slow
    job = Background(nodes.address)
    begun(job, hub)
    stream = crucible.load_dataset("org/chat", split="train", streaming=True)
    rows = iter(stream)
    assert next(rows)["id"] == 0
    process: psutil.Process = children("ray::CoordinatorCore")[0]
    process.kill()
    hub.clear_faults()
    assert [row["id"] for row in rows] == list(range(1, FILES * ROWS))
    assert job.report().rows == FILES * ROWS
    assert stream.manifest.order_id == crucible.load_dataset("org/chat", split="train").manifest.order_id

    # the same repo anew, with a file that is not what its footer says
    broken = files_of(tmp_path / "broken")
    name = f"data/train-{FILES - 1:05d}-of-{FILES:05d}.parquet"
    data = bytearray(Path(str(broken[name])).read_bytes())
    data[40:4000] = bytes(3960)
    hub.import_files("org/chat", {**broken, name: bytes(data), "data/more.txt": b"another commit"})
    hub.add("slow", origin="cdn", piece=20_000, wait=0.05)
    job = Background(nodes.address)
    until(lambda: job.seen and job.seen[-1].phase != "resolve")
    stream = crucible.load_dataset("org/chat", split=f"train[{(FILES - 1) * ROWS}:]", streaming=True)
    with pytest.raises((errors.PrefetchFailed, errors.CorruptFile)) as caught:
        list(stream)
    hub.clear_faults()
    with pytest.raises(errors.CorruptFile):
        job.report()
    assert name in str(caught.value)
