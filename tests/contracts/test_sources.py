"""What `download` relies on in every source of bytes: the Hub (LFS and regular files), a mirror, a peer's agent."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import CrucibleError
from crucible.hub.http import HubHttp, Refusal
from crucible.refs import NodeId, RepoRef, SourceFile
from crucible.report import Tally
from crucible.workers.serve import AgentServer
from crucible.workers.sources import HubSource, PeerSource, Source
from tests.hubserver.faults import FaultyHub

DATA = bytes(range(256)) * 300


class SourceContract(ABC):
    @abstractmethod
    def place(self, stack: ExitStack, folder: Path, tally: Tally) -> tuple[Source, SourceFile]:
        """A source that has DATA, and the file by which it is asked for."""

    @contextmanager
    def source(self, folder: Path) -> Iterator[tuple[Source, SourceFile, Tally]]:
        tally = Tally()
        with ExitStack() as stack:
            yield (*self.place(stack, folder, tally), tally)

    def test_the_whole_file_comes_from_its_start(self, tmp_path: Path) -> None:
        with self.source(tmp_path) as (source, file, _), source.open(file, 0, len(DATA)) as body:
            assert body.start == 0
            assert b"".join(map(bytes, body.chunks)) == DATA

    @pytest.mark.parametrize(("start", "stop"), [(0, 1), (1000, 50_000), (len(DATA) - 1, len(DATA))])
    def test_a_range_begins_where_the_body_says(self, tmp_path: Path, start: int, stop: int) -> None:
        with self.source(tmp_path) as (source, file, _), source.open(file, start, stop) as body:
            data = b"".join(map(bytes, body.chunks))
        assert DATA[body.start : stop] == data[: stop - body.start]
        assert body.start in (0, start)

    def test_what_is_not_there_is_refused_and_has_a_typed_error(self, tmp_path: Path) -> None:
        with self.source(tmp_path) as (source, file, _):
            missing = SourceFile("f" * 64, file.size, file.oid, file.lfs)
            with pytest.raises(Refusal) as caught, source.open(missing, 0, 10) as body:
                list(body.chunks)
            assert not caught.value.retryable
            error = source.refused(missing, caught.value)
            assert isinstance(error, CrucibleError)
            assert "ffffff" in str(error)

    def test_bytes_are_counted_where_they_came_from(self, tmp_path: Path) -> None:
        with self.source(tmp_path) as (source, _, tally):
            source.count(7)
            counts = tally.counts
        assert counts.hub_bytes + counts.peer_bytes + counts.local_bytes == 7


class TestHubLfs(SourceContract):
    lfs = True

    def place(self, stack: ExitStack, folder: Path, tally: Tally) -> tuple[Source, SourceFile]:
        hub = stack.enter_context(FaultyHub(folder / "hub"))
        commit = hub.import_files("org/data", {"data/a file.bin": DATA}, lfs=self.lfs)
        http = HubHttp(Settings(folder / "home", endpoint=hub.endpoint), tally)
        stack.callback(http.close)
        file = SourceFile("data/a file.bin", len(DATA), hashlib.sha256(DATA).hexdigest(), self.lfs)
        return HubSource(http, RepoRef("org/data", commit)), file


class TestHubRegular(TestHubLfs):
    lfs = False


class TestPeer(SourceContract):
    def place(self, stack: ExitStack, folder: Path, tally: Tally) -> tuple[Source, SourceFile]:
        store, key = Store(folder), "ab" * 32
        with store.workspace() as work:
            (work / "x").write_bytes(DATA)
            store.commit_shard(work / "x", key)
        agent = AgentServer(store, "secret", NodeId("n"), "127.0.0.1", 0, lambda _: [])
        stack.callback(agent.close)
        file = SourceFile(key, len(DATA), hashlib.sha256(DATA).hexdigest(), lfs=True)
        return PeerSource(agent.url, "secret", tally, timeout_s=5), file
