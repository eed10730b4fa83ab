"""What was prefetched goes to a machine that reaches no Hub, as a folder or a tar, and is the same there."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.bundle import read_lock, verify
from crucible.cache.store import Store
from crucible.cluster.bundles import export_bundle
from crucible.cluster.drive import LocalExecutor, run_job
from crucible.cluster.prepare import prepare
from crucible.config import Settings
from crucible.data_files import data_request
from crucible.errors import BundleError, ManifestError, NoRoom, OfflineMode, UsageError
from crucible.hashing import shard_digest
from crucible.lockfile import NAME
from crucible.refs import NodeId
from crucible.report import Tally
from crucible.workers.work import Workplace
from tests.crucible.bundle_cases import Sides, contents, everything, rewritten
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


@pytest.mark.parametrize(
    "asked",
    [
        {"columns": ["id"]},
        {"data_files": {"other": ["data/b.jsonl"]}},
        {"data_dir": "data"},
        {"features": {"id": {"dtype": "int32", "_type": "Value"}, "nested": {"dtype": "string", "_type": "Value"}}},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_another_choice_of_the_same_repo_is_another_dataset_on_both_sides(
    sides: Sides, tmp_path: Path, asked: dict[str, Any]
) -> None:
    split: dict[str, Any] = {"split": "test"} if "features" in asked else {}
    if "features" in asked:
        sides.hub.import_files("org/data", {"test.jsonl": b'{"id": 1, "nested": "x"}\n'})
    sides.at(sides.outside)
    expected = shown(**asked, **split)
    export_bundle("org/data", out=tmp_path / "b", **asked, **split)
    sides.take(tmp_path / "b")
    assert shown(**asked, **split) == expected
    with pytest.raises(OfflineMode):
        shown()


def shown(**asked: Any) -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Split -> (features, rows)."""
    found: Any = crucible.load_dataset("org/data", **asked)
    splits = found if isinstance(found, dict) else {asked["split"]: found}
    return {name: (str(one.features), one.to_list()) for name, one in splits.items()}


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


def test_an_import_that_is_killed_leaves_a_store_that_loads_and_is_continued(sides: Sides, tmp_path: Path) -> None:
    sent = sides.export(tmp_path / "b.tar")
    data = (tmp_path / "b.tar").read_bytes()
    sides.at(sides.inside, offline=True)
    process = subprocess.Popen([sys.executable, "-m", "crucible", "import", "-"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(data[: len(data) * 3 // 4])
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while len(list(Store(sides.inside).shards())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait(30)
    process.stdin.close()
    came = len(list(Store(sides.inside).shards()))
    assert came >= 2
    assert list(Store(sides.inside).manifests()) == []
    with pytest.raises(OfflineMode):
        everything()
    assert sides.take(tmp_path / "b.tar").reused == came
    assert list((sides.inside / "tmp").iterdir()) == []
    assert len(everything()["train"][1]) == 600
    assert came < sent.shards


def test_what_was_imported_is_done_again_by_nobody_also_where_a_file_has_no_rows(sides: Sides, tmp_path: Path) -> None:
    """A job over it finds every item done, and gives the manifests that were imported."""
    row = b'{"id": 1, "text": "' + b"x" * 300_000 + b'"}\n'
    sides.hub.import_files("org/gaps", {"a.jsonl": row, "b.jsonl": b"\n" * 300_000, "c.jsonl": row})
    sides.at(sides.outside)
    crucible.load_dataset("org/gaps")
    export_bundle("org/gaps", out=tmp_path / "b")
    (expected,) = read_lock(str(tmp_path / "b")).manifests
    assert len(expected.items) == 3
    assert {shard.item for shard in expected.shards} == {0, 2}
    sides.take(tmp_path / "b")
    settings, tally = Settings.from_env(), Tally()
    request = data_request("org/gaps", None, split=None, revision=None, columns=None)
    prepared = prepare(request, settings, Store(settings.home), tally, again=True)
    executor = LocalExecutor(Workplace(Store(settings.home), settings, NodeId("here")))
    try:
        (made,), report = run_job("job", prepared, executor, limit_bytes=1 << 30)
    finally:
        executor.close()
    assert (made.id, report.reused_items) == (expected.id, 3)


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
