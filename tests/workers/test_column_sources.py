"""Ranges of columns from sources that change, lie, or say too little; and the name under which they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crucible.cache.blobs import BlobFolder
from crucible.errors import SourceUnavailable
from crucible.refs import SourceFile
from crucible.report import Tally
from crucible.workers.columns import bring_columns, ranges_of
from crucible.workers.download import DownloadOptions
from crucible.workers.sources import PeerSource
from tests.fakes.scripted import Request, server
from tests.workers.partial_cases import COLUMNS, parquet, table

DATA = parquet()


def send(request: Request, data: bytes, *, size: str = str(len(DATA)), etag: str = "") -> None:
    said = f"bytes {request.start}-{request.stop - 1}/{size}"
    request.send(data[request.start : request.stop], content_range=said, etag=etag)


def right(request: Request) -> None:
    send(request, DATA)


def bring_from(folder: Path, *urls: str) -> tuple[Path, SourceFile]:
    file = SourceFile("x", len(DATA), hashlib.sha256(DATA).hexdigest(), lfs=True)
    options = DownloadOptions(part_bytes=1 << 20, tries=2, backoff_cap_s=0.01, stall_s=60)
    sources = [PeerSource(url, "secret", Tally(), timeout_s=20) for url in urls]
    return bring_columns(file, COLUMNS, sources, BlobFolder(folder, None), options, Tally())


def test_where_the_ranges_of_one_source_are_wrong_another_is_asked(tmp_path: Path) -> None:
    def liar(request: Request) -> None:
        send(request, DATA[:-1] + b"?")

    with server(liar) as (first, lies), server(right) as (second, asked):
        path, _ = bring_from(tmp_path, first, second)
    assert len(lies) == 1, "the other one is nearer than a second try"
    assert len(asked) > 1
    assert pq.read_table(path, columns=list(COLUMNS)).equals(table().select(list(COLUMNS)))


def test_a_file_that_changes_between_two_ranges_is_begun_anew_and_refused_the_second_time(tmp_path: Path) -> None:
    other = parquet(table(seed=8))
    changes = 1

    def changing(request: Request) -> None:
        later = min(changes, request.number // 2)
        send(request, DATA if later == changes else other, etag=f'"{later}"')

    assert len(other) >= len(DATA) - 1000
    with server(changing) as (url, asked):
        path, file = bring_from(tmp_path / "once", url)
        assert asked.count(asked[0]) == 2, "all that had come was forgotten"
        changes = 99
        with pytest.raises(SourceUnavailable, match=r"its ETag became .* between two ranges"):
            bring_from(tmp_path / "ever", url)
    assert pq.read_table(path, columns=list(COLUMNS)).equals(table().select(list(COLUMNS)))
    assert path.name == file.oid != hashlib.sha256(DATA).hexdigest()
    assert list((tmp_path / "ever").iterdir()) == []


def test_a_reply_must_say_how_long_the_file_is(tmp_path: Path) -> None:
    def silent(request: Request) -> None:
        send(request, DATA, size="*")

    with server(silent) as (url, _), pytest.raises(SourceUnavailable, match="how long the file is"):
        bring_from(tmp_path, url)


def test_ranges_lie_under_a_name_that_is_no_contents(tmp_path: Path) -> None:
    with server(right) as (url, asked):
        path, file = bring_from(tmp_path, url)
        assert bring_from(tmp_path, url)[0] == path
    assert len(asked) == len(set(asked)), "the second time it was there"
    whole = SourceFile("x", len(DATA), hashlib.sha256(DATA).hexdigest(), lfs=True)
    assert not BlobFolder(tmp_path, None).has(whole)
    assert file == ranges_of(whole, reversed(COLUMNS))  # type: ignore[arg-type]
    assert ranges_of(whole, ["c03"]).oid != file.oid != whole.oid
    status = path.stat()
    assert status.st_size == len(DATA)
    assert status.st_blocks * 512 < len(DATA) / 2, "what was left out takes no room"
