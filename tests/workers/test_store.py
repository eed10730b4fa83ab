"""The store on disk: what is visible is whole, what is dead is swept, what is broken is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crucible.cache.store import Store, disk_errors, is_key
from crucible.errors import DiskFull, ManifestError, StoreError, StoreReadOnly, StoreVersion
from crucible.manifest import Manifest, manifest_from_json
from crucible.refs import NodeId, ReadOptions, RepoRef, ShardInfo, SourceFile, WorkItem
from crucible.report import ItemResult

KEY = "ab" * 32
REPO = RepoRef("org/data", "c" * 40)
ITEM = WorkItem(0, REPO, (SourceFile("a.jsonl", 3, "f" * 40, False),), ReadOptions("json"), 1 << 20)


def manifest_of(rows: int = 2) -> Manifest:
    shard = ShardInfo(KEY, rows, 5, "d" * 64, "s" * 64, 0, 0)
    return Manifest(REPO, "main", "train.500", None, "s" * 64, (("s" * 64, "AA=="),), (ITEM,), (shard,))


def test_a_shard_is_visible_only_after_its_rename(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.workspace() as folder:
        draft = folder / "0.arrow"
        draft.write_bytes(b"12345")
        shard = ShardInfo(KEY, 1, 5, "d", "", 0, 0)
        assert not store.has_shard(shard)
        store.commit_shard(draft, KEY)
        assert store.has_shard(shard)
    assert list(store.shards()) == [(KEY, 5)]
    assert not store.has_shard(ShardInfo(KEY, 1, 6, "d", "", 0, 0)), "a shard of another length is another shard"
    assert store.has_shard(ShardInfo(KEY, 1, 6, "", "", 0, 0)), "unless its length was guessed before it was made"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_workspace_of_a_killed_process_is_swept_and_a_live_one_is_not(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from crucible.cache.store import Store\n"
        "with Store(Path(sys.argv[1])).workspace() as folder:\n"
        "    (folder / 'half').write_bytes(b'x' * 100); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert killed.returncode == -9
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    with Store(tmp_path).workspace() as mine, Store(tmp_path).workspace() as also_mine:
        assert {path.name for path in (tmp_path / "tmp").iterdir()} == {mine.name, also_mine.name}


def test_an_item_is_done_only_while_all_its_shards_are_here(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shard = ShardInfo(ITEM.shard_key(0), 1, 5, "d" * 64, "s" * 64, 0, 0)
    with store.workspace() as folder:
        (folder / "x").write_bytes(b"12345")
        store.commit_shard(folder / "x", shard.key)
    store.put_item(ItemResult(0, ITEM.key, NodeId("n"), (shard,), (("s" * 64, "AA=="),)))
    found = store.get_item(ITEM, NodeId("n"))
    assert found is not None
    assert (found.shards, found.reused) == ((shard,), True)
    assert list(store.item_keys()) == [ITEM.key]
    store.shard_path(shard.key).unlink()
    assert store.get_item(ITEM, NodeId("n")) is None


def test_a_manifest_is_found_by_commit_and_by_branch_and_survives_odd_names(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = manifest_of()
    store.put_manifest(manifest, ("refs/pr/1", "main"))
    for revision in ("c" * 40, "refs/pr/1", "main"):
        found = store.find_manifests(RepoRef("org/data", revision), "main")
        assert found == {"train.500": manifest.id}
    assert store.find_manifests(REPO, "other") == {}
    assert store.find_manifests(REPO, "main", ("x",)) == {}, "a column subset is another dataset"
    assert store.get_manifest(manifest.id) == manifest
    assert list(store.manifests()) == [manifest]


def test_an_altered_manifest_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    manifest = manifest_of()
    store.put_manifest(manifest)
    path = tmp_path / "manifests" / f"{manifest.id}.json"
    path.write_bytes(path.read_bytes().replace(b'"rows":2', b'"rows":3'))
    with pytest.raises(ManifestError, match=r"altered on disk"):
        store.get_manifest(manifest.id)
    with pytest.raises(ManifestError, match=r"is not in"):
        store.get_manifest("0" * 64)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": 99}', b"\xff", b'{"format": 1, "repo": 3}'])
def test_a_manifest_that_is_none_gives_a_typed_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest_from_json(data, "0" * 64)


@pytest.mark.parametrize("key", ["", "../" * 21 + "x", "AB" * 32, "ab" * 31, "ab" * 31 + "/x", "g" * 64])
def test_only_hex_keys_become_paths(tmp_path: Path, key: str) -> None:
    assert not is_key(key)
    with pytest.raises(StoreError):
        Store(tmp_path).shard_path(key)


def test_a_store_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "VERSION").write_text("99\n")
    with pytest.raises(StoreVersion, match="layout 99"):
        Store(tmp_path)


def test_disk_errors_are_translated_by_what_the_disk_said(tmp_path: Path) -> None:
    import errno

    cases = {errno.ENOSPC: DiskFull, errno.EDQUOT: DiskFull, errno.EROFS: StoreReadOnly, errno.EIO: StoreError}
    for number, expected in cases.items():
        with pytest.raises(expected, match=str(tmp_path)), disk_errors(tmp_path):
            raise OSError(number, os.strerror(number))


def test_the_secret_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    from crucible.workers.secret import ensure_secret, load_secret

    store = Store(tmp_path)
    assert load_secret(store) is None
    secret = ensure_secret(store)
    assert ensure_secret(store) == secret == load_secret(store)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
