"""What is no bundle, or not the whole of one, is refused by name, and nothing of it can be seen."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import threading
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible import ustar
from crucible.bundle import read_lock, verify
from crucible.errors import BundleError, ChecksumMismatch
from crucible.lockfile import NAME
from crucible.refs import canonical_json, digest_of
from tests.crucible.bundle_cases import Sides, lock_dict
from tests.crucible.bundle_cases import sides as sides


@pytest.fixture
def whole(sides: Sides, tmp_path: Path) -> Path:
    """A folder bundle; `whole.with_suffix(".tar")` is the tar."""
    sides.export(tmp_path / "b")
    sides.export(tmp_path / "b.tar")
    return tmp_path / "b"


def refused(sides: Sides, path: Path) -> str:
    """What import and verify say of a bundle that is wrong, which is the same; nothing of it is visible."""
    with pytest.raises((BundleError, ChecksumMismatch)) as seen:
        verify(str(path))
    with pytest.raises((BundleError, ChecksumMismatch)) as taken:
        sides.take(path)
    assert str(seen.value) == str(taken.value)
    assert sides.inside_is_empty()
    return str(seen.value)


def test_a_flipped_byte_of_a_shard_is_named(sides: Sides, whole: Path) -> None:
    shard = sorted((whole / "shards").rglob("*.arrow"))[0]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    said = refused(sides, whole)
    assert shard.relative_to(whole).as_posix() in said
    assert "expected" in said


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_tar_with_any_bit_flipped_or_any_end_cut_off_is_refused(
    sides: Sides, whole: Path, where: float, bit: int, cut: bool
) -> None:
    data = bytearray(whole.with_suffix(".tar").read_bytes())
    at = int(where * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    wrong = whole.with_name("wrong.tar")
    wrong.write_bytes(data)
    shutil.rmtree(sides.inside, ignore_errors=True)  # what is there already would not be taken again
    with pytest.raises((BundleError, ChecksumMismatch)) as seen:
        sides.take(wrong)
    assert "wrong.tar" in str(seen.value)
    assert sides.inside_is_empty()


@pytest.mark.parametrize("change", ["missing", "extra", "longer", "shorter", "link", "folder link", "folder", "pipe"])
def test_a_folder_with_other_members_is_refused_by_the_name_of_the_first(
    sides: Sides, whole: Path, tmp_path: Path, change: str
) -> None:
    shard = sorted((whole / "shards").rglob("*.arrow"))[0]
    name = shard.relative_to(whole).as_posix()
    data = shard.read_bytes()
    match change:
        case "missing":
            shard.unlink()
        case "extra":
            name = "shards/zz.sh"
            (whole / name).write_text("#!/bin/sh\n")
        case "longer":
            shard.write_bytes(data + b"x")
        case "shorter":
            shard.write_bytes(data[:-1])
        case "link":
            (tmp_path / "aside").write_bytes(data)
            shard.unlink()
            shard.symlink_to(tmp_path / "aside")
        case "folder link":
            os.replace(shard.parent, tmp_path / "aside")
            shard.parent.symlink_to(tmp_path / "aside")
        case "folder":
            shard.unlink()
            shard.mkdir()
        case "pipe":
            shard.unlink()
            os.mkfifo(shard)
    assert name in refused(sides, whole)


def member(name: str, **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, b"x" * info.size


@pytest.mark.parametrize(
    "evil",
    [
        member("../../etc/cron.d/x", size=4),
        member("/etc/cron.d/x", size=4),
        member("shards/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("shards/link", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        member("shards/device", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("shards/folder", type=tarfile.DIRTYPE),
        member("x" * 300, size=4),
        member("\x1b[31mred", size=4),
    ],
    ids=["traversal", "absolute", "symlink", "hardlink", "device", "folder", "long", "escape"],
)
@pytest.mark.parametrize("first", [False, True], ids=["within", "first"])
def test_a_tar_with_anything_else_in_it_is_refused(
    sides: Sides, whole: Path, tmp_path: Path, evil: tuple[tarfile.TarInfo, bytes], first: bool
) -> None:
    made = tmp_path / "evil.tar"
    with tarfile.open(whole.with_suffix(".tar")) as tar, tarfile.open(made, "w", format=tarfile.GNU_FORMAT) as out:
        for number, one in enumerate(tar.getmembers()):
            if number == (0 if first else 2):
                out.addfile(evil[0], io.BytesIO(evil[1]))
            out.addfile(one, tar.extractfile(one))
    said = refused(sides, made)
    assert "evil.tar" in said
    assert "\x1b" not in said
    assert not Path("/etc/cron.d/x").exists()


def test_bytes_behind_a_tar_are_refused(sides: Sides, whole: Path) -> None:
    tar = whole.with_suffix(".tar")
    tar.write_bytes(tar.read_bytes() + b"\0")
    assert "goes on at byte" in refused(sides, tar)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "is of format 2, this crucible reads 1; use crucible"),
        ({"conversion": 99}, "has shards of conversion 99, this crucible makes"),
        ({"kind": "lunch"}, "is no lock file of crucible"),
        ({"commit": "0" * 40, "survey": {"commit": "0" * 40}}, "about another commit"),
        ({"request": {"repo": {"repo_id": "a/b"}, "shell": "rm"}}, "has other keys"),
        ({"manifests": []}, "cannot be read"),
        ({"splits": None}, "cannot be read"),
    ],
)
def test_a_lock_file_that_says_something_else_is_refused(
    sides: Sides, whole: Path, change: dict[str, Any], said: str
) -> None:
    raw = {**lock_dict(whole), **change}
    (whole / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
    assert said in refused(sides, whole)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b"[" * 200_000, b'{"kind":"crucible lock"', b"null"])
def test_what_is_no_lock_file_is_refused(sides: Sides, whole: Path, data: bytes) -> None:
    (whole / NAME).write_bytes(data)
    assert NAME in refused(sides, whole)


def test_a_lock_file_that_is_too_big_is_not_read(
    sides: Sides, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (whole / NAME).stat().st_size
    monkeypatch.setenv("CRUCIBLE_LOCK_BYTES", str(size - 1))
    for path in (whole, whole.with_suffix(".tar")):
        assert f"CRUCIBLE_LOCK_BYTES allows {size - 1:,}" in refused(sides, path)
    with pytest.raises(BundleError, match="CRUCIBLE_LOCK_BYTES"):
        read_lock(str(whole / NAME))
    monkeypatch.setenv("CRUCIBLE_LOCK_BYTES", str(size))
    assert sides.take(whole.with_suffix(".tar")).lock == read_lock(str(whole / NAME)).digest


@pytest.mark.parametrize("endless", [False, True])
def test_a_lock_file_through_a_pipe_is_read_up_to_its_bound(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endless: bool
) -> None:
    monkeypatch.setenv("CRUCIBLE_LOCK_BYTES", "8MiB")
    data = (whole / NAME).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    written = 0

    def write() -> None:
        nonlocal written
        with suppress(BrokenPipeError), open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            for piece in repeat(b"{" * (1 << 16)) if endless else [data]:
                written += pipe.write(piece) or 0

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    if endless:
        with pytest.raises(BundleError, match=r"has more than 8,388,608 bytes, CRUCIBLE_LOCK_BYTES"):
            read_lock(str(tmp_path / "pipe"))
    else:
        assert read_lock(str(tmp_path / "pipe")).to_json() == data
    writer.join(30)
    assert written <= 9 << 20


def test_a_manifest_under_names_that_its_recipe_denies_is_refused(sides: Sides, whole: Path) -> None:
    """Else a bundle could plant its rows under the name of a shard of any other dataset."""
    raw = lock_dict(whole)
    shards = raw["manifests"][0]["shards"]
    shards[0]["key"] = "0" * 64
    raw["splits"][0]["manifest"] = digest_of(raw["manifests"][0])
    (whole / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
    assert "is not what its key says" in refused(sides, whole)


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ({"repo_type": "../../../../planted/x"}, "is no kind of repo"),
        ({"repo_type": ["dataset"]}, "is no repo of a Hub"),
        ({"repo_id": "/etc"}, "is no repo of a Hub"),
        ({"repo_id": "../x"}, "is no repo of a Hub"),
        ({"revision": 5}, "is no repo of a Hub"),
    ],
)
@pytest.mark.parametrize("items", [False, True])
def test_a_repo_whose_name_would_lead_elsewhere_is_refused(
    sides: Sides, tmp_path: Path, repo: dict[str, Any], said: str, items: bool
) -> None:
    """With the source files a bundle also says which folder of the Hub cache they go to."""
    sides.export(tmp_path / "raw", raw=True)
    raw = lock_dict(tmp_path / "raw")
    for split, manifest in zip(raw["splits"], raw["manifests"], strict=True):
        for item in manifest["items"]:
            item["repo"].update(repo)
        if not items:
            manifest["repo"].update(repo)
        split["manifest"] = digest_of(manifest)
    if not items:
        raw["request"]["repo"].update(repo)
    (tmp_path / "raw" / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
    assert said in refused(sides, tmp_path / "raw")
    assert not list(tmp_path.rglob("planted*"))


def test_a_bundle_gives_no_other_commit_its_rows(sides: Sides, whole: Path) -> None:
    raw = lock_dict(whole)
    raw["request"]["repo"]["revision"] = "0" * 40
    (whole / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
    assert "it was asked for 000000000000, its shards are of" in refused(sides, whole)


@pytest.mark.parametrize("name", ["config", "split"])
def test_a_name_that_is_no_text_is_refused(sides: Sides, whole: Path, name: str) -> None:
    raw = lock_dict(whole)
    for split, manifest in zip(raw["splits"], raw["manifests"], strict=True):
        manifest[name] = [manifest[name]]
        split["manifest"] = digest_of(manifest)
    (whole / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
    assert "cannot be read" in refused(sides, whole) or "is none" in refused(sides, whole)


def test_a_path_that_is_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nothing: cannot be opened \(No such file"):
        verify(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="no bundle"):
        verify(str(tmp_path / "empty"))
    (tmp_path / "x.tar").write_bytes(b"not a tar")
    with pytest.raises(BundleError):
        verify(str(tmp_path / "x.tar"))


@given(st.integers(0, 2**40), st.from_regex(r"[a-z._/-]{0,98}[a-z0-9]", fullmatch=True))
def test_headers_are_those_that_tar_reads(size: int, name: str) -> None:
    block = ustar.header(name, size)
    info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    assert (info.name, info.size, info.isreg()) == (name, size, True)
    assert ustar.size_in(block, name) == size
    assert ustar.size_in(bytes(512), name) is None
    assert (size + ustar.padding(size)) % ustar.BLOCK == 0
