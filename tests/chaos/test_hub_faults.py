"""A whole `load_dataset` against a Hub on which one thing goes wrong. It ends in the right rows or in a typed error
that names the file and the source; never in a wrong or a missing row; and nothing it leaves behind stops the next run.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible.config import Settings
from crucible.errors import (
    ChecksumMismatch,
    CorruptFile,
    CrucibleError,
    DiskFull,
    SizeMismatch,
    SourceUnavailable,
    StoreError,
    StoreReadOnly,
)
from tests.hubserver.faults import Fault, FaultyHub

REPO = "org/faulty"
ROWS = 3000


@pytest.fixture
def repo(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    """One parquet file (LFS, from the CDN) and one jsonl (regular, from the Hub itself), as two splits."""
    table = pa.table({"id": range(ROWS), "text": [f"row {i} " + "x" * (8 * (i % 97)) for i in range(ROWS)]})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=500, compression="none")
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    hub.import_files(REPO, {"train.parquet": tmp_path / "train.parquet"})
    hub.import_files("org/regular", {"train.jsonl": lines.encode()})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1.5")
    monkeypatch.setenv("CRUCIBLE_PART_BYTES", "300000")
    return hub


def ids(repo: str) -> list[int]:
    return [row["id"] for row in crucible.load_dataset(repo, split="train", streaming=True)]


def litter() -> list[str]:
    """What a run must not leave: drafts, partial downloads, half-written files."""
    home = Settings.from_env().home
    return [
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and (path.relative_to(home).parts[0] in ("tmp", "raw") or path.name.startswith("."))
    ]


PASSING = {
    "a cut body": Fault("cut", path="*/blobs/*", origin="cdn", after=20_000, times=2),
    "a cut body of a regular file": Fault("cut", path="*/resolve/*.jsonl", after=50_000, times=1),
    "a flipped byte, once": Fault("flip", origin="cdn", after=1000, times=1),
    "a flipped byte of a regular file, once": Fault("flip", path="*/resolve/*.jsonl", after=1000, times=1),
    "a lying Content-Length, once": Fault("wrong-length", origin="cdn", by=500, times=1),
    "a Content-Length that is short, once": Fault("wrong-length", origin="cdn", by=-500, times=1),
    "a Content-Length that always lies, over right bytes": Fault("wrong-length", origin="cdn", by=900),
    "a wrong Content-Range, once": Fault("wrong-range", origin="cdn", by=7, times=1, skip=1),
    "ranges ignored": Fault("ignore-range", origin="cdn"),
    "503 on a GET": Fault("status", origin="cdn", status=503, times=2),
    "500 on the listing": Fault("status", path="*/tree/*", status=500, times=2),
    "502 on the info": Fault("status", path="/api/datasets/*/revision/*", status=502, times=1),
    "503 with Retry-After": Fault("retry-after", path="*/resolve/*", status=503, wait=1, times=1),
    "429 with a RateLimit header": Fault("429", path="*/resolve/*", wait=0.2, times=1),
    "429 on the listing": Fault("429", path="*/tree/*", wait=0.2, times=1),
    "an expired CDN link": Fault("expired", origin="cdn", times=1),
    "a CDN link that expires midway": Fault("expired", origin="cdn", times=1, skip=1, status=401),
    "a reset connection": Fault("reset", origin="cdn", times=2),
    "a reset of the Hub": Fault("reset", origin="hub", times=2),
    "a stalled socket": Fault("stall", origin="cdn", after=10_000, times=1),
    "a slow body": Fault("slow", origin="cdn", piece=20_000, wait=0.01, times=2),
    "gzip on a text file": Fault("gzip", path="*/resolve/*.jsonl"),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_costs_no_row(repo: FaultyHub, name: str) -> None:
    fault = PASSING[name]
    target = "org/regular" if "jsonl" in fault.path else REPO
    repo.add(fault)
    assert ids(target) == list(range(ROWS))
    assert repo.hits(fault) >= 1, "the fault never happened: this test shows nothing"
    assert litter() == []


LASTING: dict[str, tuple[Fault, type[CrucibleError], str]] = {
    "a flipped byte": (Fault("flip", origin="cdn", after=1000), ChecksumMismatch, "train.parquet"),
    "a cut body": (Fault("cut", origin="cdn", after=0), SourceUnavailable, "train.parquet"),
    "500": (Fault("status", origin="cdn", status=500), SourceUnavailable, "train.parquet"),
    "a stalled socket": (Fault("stall", origin="cdn", after=0), SourceUnavailable, "train.parquet"),
    "a wrong range": (Fault("wrong-range", origin="cdn", by=3), SourceUnavailable, "train.parquet"),
    "links that are always expired": (Fault("expired", origin="cdn"), SourceUnavailable, "train.parquet"),
    "a Hub that is down": (Fault("status", origin="hub", status=503), SourceUnavailable, REPO),
    "a Hub that resets": (Fault("reset", origin="hub"), SourceUnavailable, REPO),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_lasts_ends_in_one_error_and_the_next_run_is_well(
    repo: FaultyHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("CRUCIBLE_TRIES", "2")
    fault, expected, named = LASTING[name]
    repo.add(fault)
    with pytest.raises(expected) as caught:
        ids(REPO)
    assert named in str(caught.value)
    assert repo.endpoint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert litter() == []
    repo.clear_faults()
    assert ids(REPO) == list(range(ROWS))


def test_a_file_that_is_not_what_its_name_says_is_named(repo: FaultyHub) -> None:
    repo.import_files("org/garbage", {"train.parquet": b"PAR1 this is not parquet at all PAR1"})
    with pytest.raises(CorruptFile, match=r"train\.parquet"):
        ids("org/garbage")
    broken = gzip.compress(b'{"id": 1}\n' * 1000)[:-20]
    repo.import_files("org/broken", {"train.jsonl.gz": broken})
    with pytest.raises(CorruptFile, match=r"train\.jsonl\.gz"):
        ids("org/broken")
    assert litter() == []


def test_a_full_disk_is_named_and_leaves_a_store_that_works(
    repo: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)],
            capture_output=True,
            timeout=20,
            check=False,
        ).returncode
    ):
        pytest.skip("a small tmpfs needs the right to mount")
    try:
        monkeypatch.setenv("CRUCIBLE_HOME", str(small / "store"))
        with pytest.raises(DiskFull, match=str(small)):
            ids(REPO)
        assert litter() == []
        repo.import_files("org/tiny", {"train.jsonl": b'{"id": 0}\n'})
        assert ids("org/tiny") == [0], "the store took no harm"
    finally:
        subprocess.run(["umount", "-l", str(small)], timeout=20, check=True)


def test_a_read_only_store_serves_what_it_has_and_names_what_it_cannot_write(
    repo: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ids(REPO) == list(range(ROWS))
    home = Settings.from_env().home
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "--bind", str(home), str(frozen)], capture_output=True, timeout=20, check=False
        ).returncode
    ):
        pytest.skip("a read-only mount needs the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(frozen)], timeout=20, check=True)
        monkeypatch.setenv("CRUCIBLE_HOME", str(frozen))
        assert ids(REPO) == list(range(ROWS))
        with pytest.raises((StoreReadOnly, StoreError), match=str(frozen)):
            ids("org/regular")
    finally:
        subprocess.run(["umount", "-l", str(frozen)], timeout=20, check=True)


def test_a_process_killed_while_it_downloads_leaves_nothing_that_blocks_the_next(repo: FaultyHub) -> None:
    fault = repo.add("slow", origin="cdn", piece=2000, wait=0.05)
    script = f"import crucible; crucible.load_dataset({REPO!r}, split='train')"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while repo.bytes_sent() < 10_000 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(10)
    assert repo.hits(fault) >= 1
    assert litter(), "it was killed in the middle"
    repo.clear_faults()
    assert ids(REPO) == list(range(ROWS))
    assert litter() == []


def test_no_visible_shard_ever_has_wrong_bytes_while_things_fail(
    repo: FaultyHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poller reads every name in the store as it appears, during every kind of fault."""
    import threading

    from crucible.cache.store import Store
    from crucible.hashing import shard_digest

    seen: dict[str, str] = {}
    done = threading.Event()
    store = Store(Settings.from_env().home)

    def poll() -> None:
        while not done.is_set():
            for key, _ in store.shards():
                seen.setdefault(key, shard_digest(store.shard_path(key)))
            time.sleep(0.001)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        monkeypatch.setenv("CRUCIBLE_TRIES", "2")
        for kind in ("flip", "cut", "wrong-length", "wrong-range", "ignore-range", "expired", "reset"):
            repo.clear_faults()
            repo.add(kind, origin="cdn", times=3)
            try:
                ids(REPO)
            except (ChecksumMismatch, SizeMismatch, SourceUnavailable):
                continue
            break
        repo.clear_faults()
        dataset = crucible.load_dataset(REPO, split="train", streaming=True)
        assert len(list(dataset)) == ROWS
    finally:
        done.set()
        poller.join(10)
    expected = {shard.key: shard.digest for shard in dataset.manifest.shards}
    assert {key: shard_digest(store.shard_path(key)) for key in expected} == expected
    assert all(expected.get(key, digest) == digest for key, digest in seen.items())


def test_the_token_goes_to_the_hub_and_not_to_its_cdn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crucible.hub.server import HubOptions, User

    options = HubOptions(tokens={"hf_secret": User("ann")})
    with FaultyHub(tmp_path / "private-hub", options=options) as hub:
        pq.write_table(pa.table({"id": [1, 2, 3]}), tmp_path / "p.parquet")
        hub.import_files("ann/private", {"train.parquet": tmp_path / "p.parquet"}, private=True)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(crucible.errors.RepoNotFound):
            ids("ann/private")
        monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
        assert ids("ann/private") == [1, 2, 3]
        assert all(record.had_token for record in hub.requests(origin="hub")[-3:])
        assert not any(record.had_token for record in hub.requests(origin="cdn"))
        assert len(hub.requests(origin="cdn")) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_an_expired_link_to_the_end_of_a_file_is_asked_for_anew(
    repo: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A stream reads the footers of all its files before anything else, through links like those of whole files."""
    monkeypatch.setenv("CRUCIBLE_SHARD_BYTES", "300000")
    half = ROWS // 2
    for number in range(2):
        numbers = range(number * half, (number + 1) * half)
        table = pa.table({"id": numbers, "text": [f"row {i} " + "x" * 500 for i in numbers]})
        pq.write_table(table, tmp_path / f"{number}.parquet", compression="none", use_dictionary=False)
    files = {f"data/train-{number:05d}-of-00002.parquet": tmp_path / f"{number}.parquet" for number in range(2)}
    repo.import_files("org/two", files)
    fault = repo.add("expired", origin="cdn", times=3, status=status)
    assert ids("org/two") == list(range(ROWS))
    assert repo.hits(fault) == 3


def test_a_hub_that_refuses_a_file_is_not_asked_again(repo: FaultyHub) -> None:
    """A 403 of the Hub itself is an answer, unlike one of its CDN."""
    fault = repo.add("expired", origin="hub", path="*/resolve/*")
    with pytest.raises(CrucibleError):
        ids(REPO)
    assert repo.hits(fault) <= 2
