"""The Hub cache's layout, written by us and judged by the official client; and what may not be written at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crucible.cache.hubcache import HubCache
from crucible.errors import StoreReadOnly, UnsafePath, UsageError
from crucible.hashing import git_pointer_oid, hash_bytes
from crucible.refs import RepoRef, SourceFile

COMMIT, OTHER = "a" * 40, "b" * 40
REPO = RepoRef("org/data", COMMIT)
BIG = b"big" * 1000


def lfs(path: str, data: bytes = BIG, **fields: str) -> SourceFile:
    return SourceFile(path, len(data), hashlib.sha256(data).hexdigest(), True, **fields)


def regular(path: str, data: bytes) -> SourceFile:
    return SourceFile(path, len(data), hash_bytes(SourceFile(path, len(data), "", False), data), False)


def judge(cache: HubCache, script: str) -> None:
    """Run the official client's own view of the cache: `info` is its scan, and nothing may go over the network."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(cache.root),
        "HF_HOME": str(cache.root.parent / "judge"),
        "HF_HUB_CACHE": str(cache.root),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    code = "from huggingface_hub import scan_cache_dir\ninfo = scan_cache_dir()\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "hub")


def filled(cache: HubCache, *files: tuple[SourceFile, bytes], repo: RepoRef = REPO) -> None:
    for file, data in files:
        cache.blobs(repo).put(file, data)
        cache.link(repo, file)


def test_what_we_write_is_a_cache_to_the_official_client(cache: HubCache) -> None:
    top, deep = regular("README.md", b"card"), lfs("data/deep/er/a.parquet")
    filled(cache, (top, b"card"), (deep, BIG), (lfs("again.parquet"), BIG))
    cache.write_tree(REPO, [top, deep, lfs("again.parquet")])
    cache.set_ref(REPO, "main", COMMIT)
    cache.set_ref(REPO, "refs/pr/1", COMMIT)
    assert os.readlink(cache.snapshot(REPO) / "data/deep/er/a.parquet") == f"../../../../../blobs/{deep.oid}"
    assert (cache.folder(REPO) / "refs" / "main").read_bytes() == COMMIT.encode()
    assert sorted(path.name for path in cache.root.iterdir()) == ["CACHEDIR.TAG", "datasets--org--data"]
    judge(
        cache,
        f"""
        from huggingface_hub import get_cached_repo_tree, hf_hub_download, snapshot_download, try_to_load_from_cache
        assert info.warnings == [] and not info.incomplete_files
        [repo] = info.repos
        assert (repo.repo_id, repo.repo_type, repo.nb_files) == ("org/data", "dataset", 2), repo
        [revision] = repo.revisions
        assert revision.commit_hash == {COMMIT!r} and revision.refs == {{"main", "refs/pr/1"}}
        assert len(revision.files) == 3 and repo.size_on_disk == {len(BIG)} + 4
        folder = snapshot_download("org/data", repo_type="dataset", local_files_only=True)
        assert folder == {str(cache.snapshot(REPO))!r}
        path = hf_hub_download("org/data", "data/deep/er/a.parquet", repo_type="dataset")
        assert open(path, "rb").read() == b"big" * 1000
        assert try_to_load_from_cache("org/data", "README.md", repo_type="dataset", revision="refs/pr/1")
        tree = {{file.path: file for file in get_cached_repo_tree("org/data", repo_type="dataset")}}
        assert tree["again.parquet"].size == {len(BIG)} and tree["README.md"].blob_id == {top.oid!r}
        """,
    )


def test_the_listing_keeps_what_the_official_one_has_and_reads_back(cache: HubCache) -> None:
    files = (
        lfs("a.bin", xet_hash="c" * 64),
        lfs("b.bin", blob_id="d" * 40),
        lfs("c.bin", xet_hash="not a hash"),
        regular("d.txt", b"d"),
    )
    cache.write_tree(REPO, reversed(files))
    [path] = (cache.folder(REPO) / "trees").iterdir()
    listing = json.loads(path.read_text())
    assert (path.name, listing["format_version"], list(listing["files"])) == (
        f"{COMMIT}.json",
        1,
        ["a.bin", "b.bin", "c.bin", "d.txt"],
    )
    pointer = git_pointer_oid(files[0].oid, len(BIG))
    assert listing["files"]["a.bin"] == {
        "size": len(BIG),
        "blob_id": pointer,
        "lfs_sha256": files[0].oid,
        "lfs_size": len(BIG),
        "xet_hash": "c" * 64,
    }
    assert listing["files"]["b.bin"]["blob_id"] == "d" * 40
    assert "xet_hash" not in listing["files"]["c.bin"], "one that is no hash would void the listing"
    assert listing["files"]["d.txt"] == {"size": 1, "blob_id": files[3].oid}
    again = cache.read_tree(REPO)
    assert again == files
    assert again is not None
    assert [(file.xet_hash, file.blob_id) for file in again] == [("c" * 64, ""), ("", "d" * 40), ("", ""), ("", "")]
    judge(
        cache,
        f"""
        from huggingface_hub._tree_cache import read_tree_cache, write_tree_cache
        entries = read_tree_cache({str(cache.folder(REPO))!r}, {COMMIT!r})
        write_tree_cache("{cache.root.parent}/theirs", {COMMIT!r}, entries)
        theirs = open("{cache.root.parent}/theirs/trees/{COMMIT}.json").read()
        assert theirs == open({str(path)!r}).read()
        """,
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 2, "files": {}}', '{"format_version": 1}'])
def test_a_listing_that_is_none_counts_as_absent(cache: HubCache, text: str) -> None:
    assert cache.read_tree(REPO) is None
    cache.write_tree(REPO, [])
    (cache.folder(REPO) / "trees" / f"{COMMIT}.json").write_text(text)
    assert cache.read_tree(REPO) is None


def test_a_lock_is_where_and_as_the_official_client_has_it(cache: HubCache) -> None:
    file = lfs("a.bin")
    before = os.umask(0o077)
    try:
        with cache.blobs(REPO).claim(file):
            lock = cache.root / ".locks" / "datasets--org--data" / f"{file.oid}.lock"
            assert lock.stat().st_mode & 0o777 == 0o664
            taken = f"WeakFileLock({str(lock)!r}, timeout=0.1).__enter__()"
            cache.begin(REPO)
            judge(
                cache,
                f"""
                from filelock import Timeout
                from huggingface_hub.utils import WeakFileLock
                try:
                    {taken}
                except Timeout:
                    pass
                else:
                    raise AssertionError("both had it")
                """,
            )
    finally:
        os.umask(before)


def test_only_a_file_of_the_right_size_is_found_and_the_snapshot_comes_first(cache: HubCache) -> None:
    file = lfs("a.bin")
    assert cache.find(REPO, file) is None
    blob = cache.blobs(REPO).put(file, BIG)
    assert cache.find(REPO, file) == blob
    path = cache.link(REPO, file)
    assert cache.find(REPO, file) == path
    assert cache.find(RepoRef("org/data", OTHER), file) == blob
    blob.write_bytes(BIG[:-1])
    assert cache.find(REPO, file) is None
    blob.unlink()
    assert cache.find(REPO, file) is None, "a dangling link is no file"
    blob.mkdir()
    assert cache.find(REPO, file) is None


def test_a_cache_without_links_is_used_as_it_is(cache: HubCache) -> None:
    file = lfs("data/a.bin")
    path = cache.snapshot(REPO) / "data" / "a.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(BIG)
    assert cache.find(REPO, file) == path
    assert cache.link(REPO, file) == path
    assert not path.is_symlink()


@pytest.mark.parametrize("hard_links", [True, False])
def test_where_links_fail_the_file_itself_is_put_in_the_snapshot(
    cache: HubCache, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", fails)
    if not hard_links:
        monkeypatch.setattr(os, "link", fails)
    filled(cache, (lfs("a.bin"), BIG))
    cache.set_ref(REPO, "main", COMMIT)
    path = cache.snapshot(REPO) / "a.bin"
    assert not path.is_symlink()
    assert path.read_bytes() == BIG
    assert path.samefile(cache.blobs(REPO).path(lfs("a.bin").oid)) == hard_links
    assert [name.name for name in (cache.folder(REPO) / "blobs").iterdir()] == [lfs("a.bin").oid]
    judge(cache, "assert info.warnings == [] and not info.incomplete_files")


def test_what_is_wrong_at_a_path_is_replaced_and_never_written_through(cache: HubCache, tmp_path: Path) -> None:
    file = lfs("a.bin")
    mine = tmp_path / "mine"
    mine.write_text("precious")
    path = cache.snapshot(REPO) / "a.bin"
    path.parent.mkdir(parents=True)
    path.symlink_to(mine)
    blob = cache.blobs(REPO).root / file.oid
    blob.parent.mkdir(parents=True)
    blob.symlink_to(mine)
    filled(cache, (file, BIG))
    assert (mine.read_text(), path.read_bytes(), blob.is_symlink()) == ("precious", BIG, False)
    ref = cache.folder(REPO) / "refs" / "main"
    ref.parent.mkdir()
    ref.symlink_to(mine)
    cache.set_ref(REPO, "main", COMMIT)
    assert (mine.read_text(), ref.read_text(), ref.is_symlink()) == ("precious", COMMIT, False)


def test_a_blob_in_the_store_that_repos_share_is_followed_and_dropped_only_here(cache: HubCache) -> None:
    file = lfs("a.bin")
    shared = cache.root / "blobs" / "cc" / ("c" * 64)
    shared.parent.mkdir(parents=True)
    shared.write_bytes(BIG)
    blob = cache.folder(REPO) / "blobs" / file.oid
    blob.parent.mkdir(parents=True)
    blob.symlink_to(Path("../../blobs/cc", "c" * 64))
    assert cache.find(REPO, file) == blob
    assert cache.link(REPO, file).read_bytes() == BIG
    cache.drop(REPO, file)
    assert cache.find(REPO, file) is None
    assert shared.read_bytes() == BIG


def test_a_dropped_file_leaves_no_dangling_link_in_any_snapshot(cache: HubCache) -> None:
    file, moved, kept = lfs("a.bin"), lfs("sub/b.bin"), regular("c.txt", b"c")
    filled(cache, (file, BIG), (kept, b"c"))
    filled(cache, (moved, BIG), repo=RepoRef("org/data", OTHER))
    cache.drop(REPO, file)
    judge(cache, "assert info.warnings == [] and sum(len(r.files) for r in next(iter(info.repos)).revisions) == 1")


def test_a_crash_at_any_point_leaves_what_a_scan_finds_in_order(
    cache: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a pull in turn is the last one that happened; then once more with its rename left out."""
    file = lfs("a.bin")
    steps: list[Callable[[], object]] = [
        lambda: cache.write_tree(REPO, [file]),
        lambda: cache.blobs(REPO).put(file, BIG),
        lambda: cache.link(REPO, file),
        lambda: cache.set_ref(REPO, "main", COMMIT),
    ]
    for step in steps:
        with monkeypatch.context() as broken:
            broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with contextlib.suppress(KeyboardInterrupt):
                step()
        judge(cache, "assert info.warnings == [], info.warnings")
        step()
        judge(cache, "assert info.warnings == [], info.warnings")


def test_a_ref_is_written_only_to_what_is_there_and_only_when_it_moved(cache: HubCache) -> None:
    cache.set_ref(REPO, "main", COMMIT)
    judge(cache, "assert info.warnings == []")
    path = cache.folder(REPO) / "refs" / "main"
    before = path.stat()
    cache.set_ref(REPO, "main", COMMIT)
    assert path.stat().st_ino == before.st_ino
    cache.set_ref(REPO, "main", OTHER)
    assert cache.ref(RepoRef("org/data")) == OTHER
    cache.set_ref(REPO, COMMIT, COMMIT)
    assert [name.name for name in path.parent.iterdir()] == ["main"]
    path.write_text(f"{COMMIT}\n")
    assert cache.ref(RepoRef("org/data")) is None, "no commit, so not trusted"


@pytest.mark.parametrize(
    "path", ["../up", "a/../../up", "/abs", "a\\..\\up", "C:/x", "c:x", "a//b", ".", "", "nul\0", "x" * 300]
)
def test_a_path_that_leads_out_is_refused(cache: HubCache, path: str) -> None:
    for call in (cache.find, cache.link, cache.drop):
        with pytest.raises(UnsafePath):
            call(REPO, lfs(path))
    with pytest.raises(UnsafePath):
        cache.set_ref(REPO, path, COMMIT)
    assert not cache.root.exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.find(REPO, SourceFile("a", 1, "../" * 21 + "x", True)),
        lambda cache: cache.link(REPO, SourceFile("a", 1, "/" * 40, False)),
        lambda cache: cache.find(REPO, SourceFile("a", 1, "a" * 40, True)),
        lambda cache: cache.snapshot(RepoRef("org/data", "../../..")),
        lambda cache: cache.snapshot(RepoRef("org/data", "main")),
        lambda cache: cache.write_tree(RepoRef("org/data", "../x"), []),
        lambda cache: cache.set_ref(REPO, "main", "../../x"),
    ],
)
def test_a_hash_or_a_commit_that_is_none_never_becomes_a_path(
    cache: HubCache, call: Callable[[HubCache], object]
) -> None:
    with pytest.raises(UnsafePath):
        call(cache)
    assert not cache.root.exists()


@pytest.mark.parametrize("repo_id", ["../x", "/tmp/x", "a/b/c", "a--b", "a/..", ""])
def test_a_repo_id_that_is_none_has_no_folder(cache: HubCache, repo_id: str) -> None:
    with pytest.raises(UsageError):
        cache.folder(RepoRef(repo_id, COMMIT))


@pytest.fixture
def read_only() -> Iterator[HubCache]:
    """A cache with `a.bin` on `main` that this process may read, not write. Root could: it steps down for a while."""
    with tempfile.TemporaryDirectory() as folder:
        cache = HubCache(Path(folder, "hub"))
        filled(cache, (lfs("a.bin"), BIG))
        cache.write_tree(REPO, [lfs("a.bin")])
        cache.set_ref(REPO, "main", COMMIT)
        for path in (Path(folder), *Path(folder).rglob("*")):
            if path.is_dir():
                path.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield cache
        finally:
            if root:
                os.seteuid(0)
            for path in (Path(folder), *Path(folder).rglob("*")):
                if path.is_dir():
                    path.chmod(0o755)


def test_a_read_only_cache_serves_hits_and_names_the_place_when_it_must_be_written(read_only: HubCache) -> None:
    file = lfs("a.bin")
    assert read_only.find(REPO, file) == read_only.link(REPO, file)
    assert read_only.read_tree(REPO) == (file,)
    read_only.set_ref(REPO, "main", COMMIT)
    with pytest.raises(StoreReadOnly, match="HF_HUB_CACHE"):
        read_only.set_ref(REPO, "main", OTHER)
    with pytest.raises(StoreReadOnly):
        read_only.link(RepoRef("org/data", OTHER), file)
