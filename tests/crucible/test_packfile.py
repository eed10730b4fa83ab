"""Packs that git made, and packs that nobody honest would make."""

from __future__ import annotations

import hashlib
import struct
import tempfile
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.hub import packfile
from crucible.hub.packfile import PackError, PackLimits, apply_delta, unpack
from crucible.refs import SourceFile
from tests.crucible.git_cases import (
    GitRepo,
    copying,
    git_repo,
    needs_git,
    pack_head,
    packed_object,
    regular,
    sealed,
    varint,
)

ROOMY = PackLimits(size=1 << 30, objects=1 << 20, work=1 << 32)
WORDS = [b"%d: the quick brown fox number %d\n" % (n, n * n) for n in range(400)]


def taken(
    pack: bytes, wanted: dict[str, SourceFile], *, limits: PackLimits = ROOMY, cut: bool = False
) -> dict[str, bytes]:
    """What unpack hands on, by oid. What it did not is left in `wanted`."""
    got: dict[str, bytes] = {}

    def sink(file: SourceFile, data: bytes | memoryview) -> None:
        assert file.oid not in got
        got[file.oid] = bytes(data)

    with tempfile.TemporaryFile() as stream:
        stream.write(pack)
        stream.flush()
        unpack(stream, wanted, sink, limits, cut=cut)
    return got


def wanting(*contents: bytes) -> dict[str, SourceFile]:
    files = [regular(f"{number}", content) for number, content in enumerate(contents)]
    return {file.oid: file for file in files}


def blob(content: bytes) -> bytes:
    return packed_object(3, content)


@cache
def _packed_once(repo: GitRepo) -> bytes:
    return repo.pack("--delta-base-offset")


def nearness(distance: int) -> bytes:
    """The base of an OFS delta: how far back it lies."""
    made = [distance & 0x7F]
    while distance := distance >> 7:
        distance -= 1
        made.append(distance & 0x7F | 0x80)
    return bytes(reversed(made))


@pytest.fixture(scope="module")
def similar(tmp_path_factory: pytest.TempPathFactory) -> tuple[GitRepo, list[bytes]]:
    """A repo of files that are changes of each other, so git makes deltas of them."""
    repo = git_repo(tmp_path_factory.mktemp("similar"))
    contents = [b"".join(WORDS[: 200 + n % 7] + WORDS[n : n + 100]) for n in range(120)]
    contents += [b"", b"x", bytes(70_000), b"".join(WORDS) * 20]
    repo.commit({b"d%d/f%d" % (n % 5, n): content for n, content in enumerate(contents)})
    return repo, contents


@needs_git
@pytest.mark.parametrize(
    "options",
    [
        ("--delta-base-offset",),
        (),
        ("--depth=0",),
        ("--delta-base-offset", "--depth=500", "--window=200"),
        ("--depth=500",),
    ],
    ids=["by offset", "by name", "no deltas", "long chains", "long chains by name"],
)
@pytest.mark.parametrize("share", [1, 7])
def test_every_wanted_blob_comes_out_of_what_git_packs(
    similar: tuple[GitRepo, list[bytes]], options: tuple[str, ...], share: int
) -> None:
    repo, contents = similar
    wanted = wanting(*contents[::share])
    got = taken(repo.pack(*options), wanted)
    assert got.keys() == wanting(*contents[::share]).keys()
    assert sorted(got.values()) == sorted({*contents[::share]})
    assert wanted == {}


@needs_git
@pytest.mark.parametrize("options", [("--delta-base-offset", "--depth=100"), ("--depth=100",)])
def test_a_small_cache_costs_time_and_not_files(
    similar: tuple[GitRepo, list[bytes]], options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, contents = similar
    monkeypatch.setattr(packfile, "CACHE_MOST", 20_000)
    assert taken(repo.pack(*options), wanting(*contents)).keys() == wanting(*contents).keys()


names = st.binary(min_size=1, max_size=6).filter(lambda name: not {*name} & {*b"/\0"} and b"git" not in name.lower())


@needs_git
@settings(max_examples=30, deadline=None)
@given(
    files=st.dictionaries(
        st.lists(names, min_size=1, max_size=3).map(lambda parts: b"d/" * (len(parts) - 1) + b"f" + b"-".join(parts)),
        st.one_of(st.just(b""), st.binary(max_size=300), st.integers(0, 390).map(lambda n: b"".join(WORDS[n:]))),
        min_size=1,
        max_size=20,
    ),
    by_name=st.booleans(),
)
def test_any_files_come_back_as_they_went_in(files: dict[bytes, bytes], by_name: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        repo = git_repo(Path(folder))
        repo.commit(files)
        pack = repo.pack(*([] if by_name else ["--delta-base-offset"]))
    got = taken(pack, wanting(*files.values()))
    assert sorted(got.values()) == sorted({*files.values()})


@needs_git
def test_a_cut_pack_gives_what_came_of_it_and_is_refused_as_a_whole_one(similar: tuple[GitRepo, list[bytes]]) -> None:
    repo, contents = similar
    pack = repo.pack("--delta-base-offset")
    counts = []
    for end in (0, 11, 12, 40, len(pack) // 2, len(pack) - 21, len(pack) - 20, len(pack) - 1):
        counts.append(len(taken(pack[:end], wanting(*contents), cut=True)))
        with pytest.raises(PackError):
            taken(pack[:end], wanting(*contents))
    assert counts == sorted(counts)
    assert 0 < counts[-4] < counts[-1] == len(wanting(*contents))


@needs_git
@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7), resealed=st.booleans())
def test_no_wrong_byte_gets_through(similar: tuple[GitRepo, list[bytes]], at: int, bit: int, resealed: bool) -> None:
    repo, contents = similar
    pack = bytearray(_packed_once(repo))
    pack[at % len(pack)] ^= 1 << bit
    wrong = sealed(bytes(pack[:-20])) if resealed else bytes(pack)
    try:
        got = taken(wrong, wanting(*contents))
    except PackError:
        return
    assert resealed
    assert all(content in contents for content in got.values())


def test_only_the_bytes_decide_what_a_blob_is() -> None:
    pack = sealed(pack_head(3) + blob(b"right") + blob(b"wrong") + packed_object(2, b"tree1"))
    wanted = wanting(b"right", b"absent", b"tree1")
    assert taken(pack, wanted) == {regular("0", b"right").oid: b"right"}
    assert sorted(file.path for file in wanted.values()) == ["1", "2"]


def test_a_size_that_the_listing_got_wrong_is_not_handed_on() -> None:
    oid = regular("a", b"right").oid
    assert taken(sealed(pack_head(1) + blob(b"right")), {oid: SourceFile("a", 6, oid, lfs=False)}) == {}


def test_a_blob_twice_is_handed_on_once() -> None:
    pack = sealed(pack_head(2) + blob(b"right") + blob(b"right"))
    assert list(taken(pack, wanting(b"right")).values()) == [b"right"]


def ofs(delta: bytes, *, back: int | None = None) -> bytes:
    """A pack of the blob `0123456789` and a delta on it, or on what lies `back` bytes before."""
    first = blob(b"0123456789")
    return sealed(pack_head(2) + first + packed_object(6, delta, nearness(len(first) if back is None else back)))


def test_deltas_by_offset_and_by_name() -> None:
    delta = copying(10, 7, (2, 3), (0, 4))
    assert set(taken(ofs(delta), wanting(b"2340123")).values()) == {b"2340123"}
    base = bytes.fromhex(regular("b", b"0123456789").oid)
    later = sealed(pack_head(2) + packed_object(7, delta, base) + blob(b"0123456789"))  # before its base
    assert set(taken(later, wanting(b"2340123")).values()) == {b"2340123"}
    assert apply_delta(b"0123456789", b"\x90\x03\x02ab", 0, 5) == b"012ab"
    assert apply_delta(b"x" * 0x10000, b"\x80", 0, 0x10000) == b"x" * 0x10000


def test_deltas_that_name_each_other_come_to_nothing() -> None:
    """A circle of names cannot be made by hash, but names may be whatever they like."""
    one, two = bytes(20), bytes([1] * 20)
    delta = copying(10, 10, (0, 10))
    pack = sealed(pack_head(3) + packed_object(7, delta, one) + packed_object(7, delta, two) + blob(b"0123456789"))
    wanted = wanting(b"0123456780")
    assert taken(pack, wanted) == {}
    assert len(wanted) == 1


@pytest.mark.parametrize(
    ("pack", "says"),
    [
        (b"", "shorter than its head"),
        (sealed(b"PACK"), "shorter than its head"),
        (sealed(b"KCAP" + pack_head(0)[4:]), "no pack"),
        (sealed(pack_head(0, version=4)), "no pack"),
        (sealed(pack_head(1) + blob(b"wanted"))[:-1] + b"\0", "checksum"),
        (sealed(pack_head(2) + blob(b"wanted")), "object|inflated|pack ends"),
        (sealed(pack_head(1) + blob(b"wanted") + b"more"), "does not end after its last object"),
        (sealed(pack_head(1) + blob(b"wanted") + blob(b"wanted")), "does not end after its last object"),
        (sealed(pack_head(0xFFFFFFFF)), "objects where at most"),
        (sealed(pack_head(1) + packed_object(0, b"wanted")), "unknown kind 0"),
        (sealed(pack_head(1) + packed_object(5, b"wanted")), "unknown kind 5"),
        (sealed(pack_head(1) + packed_object(3, b"wanted", says=7)), "shorter than it says"),
        (sealed(pack_head(1) + packed_object(3, b"wanted", says=5)), "longer than it says"),
        (sealed(pack_head(1) + b"\xb6" + b"\xff" * 20), "absurd size"),
        (sealed(pack_head(1) + b"\x36not deflated"), "cannot be inflated"),
        (sealed(pack_head(1) + packed_object(6, b"", b"\x05")), "no object of this pack"),
        (ofs(copying(10, 6, (0, 6)), back=1), "no object of this pack"),
        (ofs(copying(10, 6, (0, 6)), back=0), "no object of this pack"),
        (ofs(copying(10, 6, (0, 6)), back=1 << 40), "no object of this pack"),
        (sealed(pack_head(1) + b"\x61" + b"\xff" * 20), "absurdly far"),
        (ofs(copying(11, 6, (0, 6))), "another size"),
        (ofs(copying(10, 6, (5, 6))), "not there"),
        (ofs(copying(10, 6, (0, 7))), "not there"),
        (ofs(copying(10, 6, (0, 5))), "fewer bytes"),
        (ofs(varint(10) + varint(6) + b"\0"), "not there"),
        (ofs(varint(10) + varint(6) + b"\x07abc"), "not there"),
        (ofs(varint(10) + varint(6) + b"\x91"), "inside an instruction"),
        (ofs(b"\xff" * 12), "without sizes"),
        (ofs(b"\x0a"), "without sizes"),
        (ofs(b""), "without sizes"),
    ],
)  # fmt: skip
def test_what_is_no_pack_of_git_is_refused(pack: bytes, says: str) -> None:
    with pytest.raises(PackError, match=says):
        taken(pack, wanting(b"0" * 6))


def bomb(size: int) -> bytes:
    """A blob of zeros that is a thousand times smaller in the pack."""
    deflater = zlib.compressobj(9)
    zeros = b"".join([*(deflater.compress(bytes(1 << 20)) for _ in range(size >> 20)), deflater.flush()])
    return packed_object(3, b"", says=size)[: -len(zlib.compress(b""))] + zeros


def test_bombs_cost_neither_memory_nor_more_work_than_was_allowed() -> None:
    big = bomb(256 << 20)
    delta = copying(256 << 20, 6, (0, 6))
    huge = varint(10) + varint(1 << 50) + b"\x81\x00"
    head = pack_head(4) + blob(b"wanted")
    packs = [
        sealed(head + big + packed_object(6, delta, nearness(len(big))) + blob(b"after!")),
        sealed(
            head + blob(b"0123456789") + packed_object(6, huge, nearness(len(blob(b"0123456789")))) + blob(b"after!")
        ),
    ]
    for pack in packs:
        tracemalloc.start()
        try:
            got = taken(pack, wanting(b"wanted", b"after!", bytes(6)))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert sorted(got.values()) == [b"after!", b"wanted"]
        assert peak < (4 << 20) + len(pack)
    with pytest.raises(PackError, match="cannot be this commit"):
        taken(packs[0], wanting(b"wanted"), limits=PackLimits(1 << 30, 100, 1 << 20))


def test_a_chain_that_grows_at_each_step_stops_at_its_allowance() -> None:
    """Each delta doubles its base: forty steps of a few bytes would be a terabyte."""
    body, size, start = pack_head(42) + blob(bytes(1 << 10)), 1 << 10, 12
    for _ in range(41):
        entry = packed_object(
            6, copying(size, 2 * size, (0, min(size, 0xFFFFFF)), (0, min(size, 0xFFFFFF))), nearness(len(body) - start)
        )
        start, body, size = len(body), body + entry, 2 * size
    wanted = {f"{n}": SourceFile(f"{n}", 1 << n, "0" * 40, lfs=False) for n in range(10, 52)}
    with pytest.raises(PackError, match="cannot be this commit"):
        taken(sealed(body), wanted, limits=PackLimits(1 << 30, 100, 1 << 20))
    assert taken(sealed(body), wanted) == {}  # beyond OBJECT_MOST nothing is made


def test_the_sinks_own_error_passes_and_the_file_stays_missing() -> None:
    wanted = wanting(b"first", b"other")

    def full(*_: object) -> None:
        raise OSError(28, "full")

    with tempfile.TemporaryFile() as stream:
        stream.write(sealed(pack_head(2) + blob(b"first") + blob(b"other")))
        stream.flush()
        with pytest.raises(OSError, match="full"):
            unpack(stream, wanted, full, ROOMY)
    assert len(wanted) == 2


@needs_git
def test_the_cases_here_are_made_as_git_makes_them(tmp_path: Path) -> None:
    pack = ofs(copying(10, 7, (2, 3), (0, 4)))
    assert struct.unpack(">4sII", pack[:12]) == (b"PACK", 2, 2)
    assert hashlib.sha1(pack[:-20], usedforsecurity=False).digest() == pack[-20:]
    repo = git_repo(tmp_path)
    (tmp_path / "a.pack").write_bytes(pack)
    repo.run("index-pack", "--strict", str(tmp_path / "a.pack"))
    assert repo.run("show-index", stdin=(tmp_path / "a.idx").read_bytes()).count(b"\n") == 2
