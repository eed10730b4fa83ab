"""What was prefetched goes to a machine that reaches no Hub, as a folder or a tar, and is the same there."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crucible
from crucible import ustar
from crucible.bundle import read_lock, verify
from crucible.cache.store import Store
from crucible.cluster.bundles import export_bundle
from crucible.errors import BundleError, ChecksumMismatch, ManifestError, NoRoom, OfflineMode, UsageError
from crucible.hashing import shard_digest, shard_hasher
from crucible.lockfile import NAME, lock_from_json
from crucible.refs import canonical_json, digest_of
from tests.crucible.bundle_cases import Sides, everything
from tests.crucible.bundle_cases import sides as sides


@pytest.mark.parametrize("name", ["bundle", "bundle.tar"])
def test_the_same_name_gives_the_same_rows_splits_and_features_without_a_hub(
    sides: Sides, tmp_path: Path, name: str
) -> None:
    sides.at(sides.outside)
    expected = everything()
    sides.hub.clear_log()
    sent = sides.export(tmp_path / name)
    assert sides.hub.log == []
    sides.at(sides.inside, offline=True)
    with pytest.raises(OfflineMode):
        everything()
    came = sides.take(tmp_path / name)
    assert (came.lock, came.splits, came.shards, came.bytes) == (sent.lock, sent.splits, sent.shards, sent.bytes)
    assert came.shards > 3
    assert everything() == expected
    stream: Any = crucible.load_dataset("org/data", split="train", revision=came.commit, streaming=True)
    assert [row["id"] for row in stream] == list(range(600))
    assert sides.hub.log == []


def test_the_same_data_gives_the_same_bytes_whoever_exports_it(sides: Sides, tmp_path: Path) -> None:
    sides.export(tmp_path / "one.tar")
    sides.export(tmp_path / "folder")
    sides.take(tmp_path / "folder")
    export_bundle("org/data", out=tmp_path / "two.tar")
    export_bundle("org/data", out=tmp_path / "again")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert contents(tmp_path / "folder") == contents(tmp_path / "again")


def test_a_bundle_is_a_tar_that_others_can_read_and_a_folder_of_the_same_files(sides: Sides, tmp_path: Path) -> None:
    sides.export(tmp_path / "b.tar")
    sides.export(tmp_path / "b")
    with tarfile.open(tmp_path / "b.tar") as tar:
        members = tar.getmembers()
        assert members[0].name == NAME
        assert all(one.isfile() and (one.mode, one.uid, one.mtime) == (0o644, 0, 0) for one in members)
        inside = {one.name: tar.extractfile(one).read() for one in members}  # type: ignore[union-attr]
    assert inside == contents(tmp_path / "b")


def test_a_split_alone_is_exported_and_the_others_are_not_there_inside(sides: Sides, tmp_path: Path) -> None:
    sides.export(tmp_path / "b.tar", split="test[:10]")
    sides.take(tmp_path / "b.tar")
    assert crucible.load_dataset("org/data", split="test").num_rows == 50  # type: ignore[union-attr]
    with pytest.raises(OfflineMode):
        crucible.load_dataset("org/data", split="train")


def test_what_was_not_prefetched_is_not_exported_and_asks_no_hub(sides: Sides, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="crucible prefetch org/data"):
        sides.export(tmp_path / "b.tar", revision="0" * 40)
    with pytest.raises(UsageError, match="is a folder of this machine"):
        export_bundle(str(tmp_path), out=tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()
    assert sides.hub.log == []


def test_source_files_come_along_and_the_official_layout_has_them(sides: Sides, tmp_path: Path) -> None:
    sent = sides.export(tmp_path / "b.tar", raw=True)
    assert sent.files == 3
    came = sides.take(tmp_path / "b.tar")
    assert came.files == 3
    snapshot = sides.inside / "hf" / "hub" / "datasets--org--data" / "snapshots" / came.commit
    whole = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert whole == {"data/a.jsonl", "data/b.jsonl", "test.jsonl"}
    for shard in (sides.inside / "shards").rglob("*.arrow"):  # made again from them, with the same bytes
        shard.unlink()
    assert len(everything()["train"][1]) == 600
    assert sides.take(tmp_path / "b.tar").reused == came.shards + came.files


def test_an_interrupted_import_leaves_nothing_half_and_is_continued(sides: Sides, tmp_path: Path) -> None:
    sent = sides.export(tmp_path / "b")
    came: list[int] = []

    def stop_after_two(progress: Any) -> None:
        came.append(progress.items_done)
        if len(came) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sides.take(tmp_path / "b", on_progress=stop_after_two)
    assert sides.inside_is_empty()
    times = {path: path.stat().st_mtime_ns for path in (sides.inside / "shards").rglob("*.arrow")}
    assert len(times) == 2
    assert sides.take(tmp_path / "b").reused == 2
    assert {path: path.stat().st_mtime_ns for path in times} == times
    again = sides.take(tmp_path / "b")
    assert again.reused == sent.shards


def test_an_interrupted_export_is_no_bundle_and_is_continued(sides: Sides, tmp_path: Path) -> None:
    def stop_after_two(progress: Any) -> None:
        if progress.items_done == 2:
            raise KeyboardInterrupt

    for name in ("b", "b.tar"):
        with pytest.raises(KeyboardInterrupt):
            sides.export(tmp_path / name, on_progress=stop_after_two)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".b")] == []
    assert not (tmp_path / "b.tar").exists()
    with pytest.raises(BundleError, match="an export that did not end"):
        verify(str(tmp_path / "b"))
    assert sides.export(tmp_path / "b").reused == 2
    assert verify(str(tmp_path / "b")).shards > 2


def test_an_export_does_not_mix_with_what_lies_there(sides: Sides, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(BundleError, match=r"thesis\.tex: is no part of this bundle"):
        sides.export(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.tex").read_text() == "mine"


def test_a_bundle_of_another_job_than_expected_is_refused(sides: Sides, tmp_path: Path) -> None:
    sent = sides.export(tmp_path / "b.tar")
    with pytest.raises(BundleError, match="wanted is 0123"):
        sides.take(tmp_path / "b.tar", lock="0123")
    assert sides.inside_is_empty()
    assert sides.take(tmp_path / "b.tar", lock=sent.lock[:12]).lock == sent.lock


def test_a_disk_without_room_is_named_before_anything_is_written(sides: Sides, tmp_path: Path) -> None:
    sides.export(tmp_path / "b.tar")
    sides.monkeypatch.setenv("CRUCIBLE_QUOTA", "50K")
    with pytest.raises(NoRoom):
        sides.take(tmp_path / "b.tar")
    assert list(Store(sides.inside).shards()) == []


def test_a_shard_here_that_another_manifest_means_otherwise_stays(sides: Sides, tmp_path: Path) -> None:
    """A bundle made by another pyarrow, or by somebody who means no good, replaces nothing that is in use here."""
    sides.export(tmp_path / "b")
    sides.take(tmp_path / "b")
    lock = read_lock(str(tmp_path / "b"))
    key, digest = lock.manifests[0].shards[0].key, lock.manifests[0].shards[0].digest
    rewritten(tmp_path / "b", key, b"ARROW1" + bytes(lock.manifests[0].shards[0].size - 6))
    with pytest.raises(BundleError, match="this store has it with other bytes"):
        sides.take(tmp_path / "b")
    assert shard_digest(Store(sides.inside).shard_path(key)) == digest
    assert len(everything()["train"][1]) == 600


def test_a_rotten_shard_here_makes_way(sides: Sides, tmp_path: Path) -> None:
    sides.export(tmp_path / "b")
    sides.take(tmp_path / "b")
    shard = next((sides.inside / "shards").rglob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    came = sides.take(tmp_path / "b")
    assert came.reused == came.shards - 1
    assert len(everything()["train"][1]) == 600


# --- what is no bundle


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


def test_a_manifest_under_names_that_its_recipe_denies_is_refused(sides: Sides, whole: Path) -> None:
    """Else a bundle could plant its rows under the name of a shard of any other dataset."""
    raw = lock_dict(whole)
    shards = raw["manifests"][0]["shards"]
    shards[0]["key"] = "0" * 64
    raw["splits"][0]["manifest"] = digest_of(raw["manifests"][0])
    (whole / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
    assert "is not what its key says" in refused(sides, whole)


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lock_dict(folder: Path) -> dict[str, Any]:
    return lock_from_json((folder / NAME).read_bytes(), "here").to_dict()


def rewritten(folder: Path, key: str, data: bytes) -> None:
    """Put other bytes in the place of a shard, and let the lock file say so."""
    digest = shard_hasher()
    digest.update(data)
    raw = lock_dict(folder)
    for manifest, split in zip(raw["manifests"], raw["splits"], strict=True):
        for shard in manifest["shards"]:
            if shard["key"] == key:
                shard["digest"] = digest.hexdigest()
        split["manifest"] = digest_of(manifest)
    (folder / "shards" / key[:2] / f"{key}.arrow").write_bytes(data)
    (folder / NAME).write_bytes(canonical_json({**raw, "digest": digest_of(raw)}))
