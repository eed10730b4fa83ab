"""What an import puts on disk, refuses, and leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

from crucible.errors import RepoNotFound, RevisionNotFound, UnsafePath, UsageError
from crucible.hub.server import HubServer, create_tag, delete_repo, import_files, import_folder, rename_repo
from crucible.hub.server.repos import Store
from crucible.hub.server.snapshot import FileEntry, Snapshot


def tree(root: Path, repo: str = "org/data", revision: str = "main") -> Snapshot:
    opened = Store(root).open("dataset", repo)
    return opened.snapshot(opened.pin(revision))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    (made / "train").mkdir(parents=True)
    (made / ".git").mkdir()
    (made / ".git" / "config").write_text("secret")
    (made / "README.md").write_text("hello")
    (made / "train" / "a.parquet").write_bytes(b"PAR1")
    (made / "unknown.xyz").write_bytes(b"\0binary")
    (made / "empty.bin").write_bytes(b"")
    return made


def test_a_folder_becomes_a_commit_of_its_files(tmp_path: Path, folder: Path) -> None:
    import_folder(tmp_path / "hub", "org/data", folder)
    files = {file.path: file.lfs for file in tree(tmp_path / "hub").files}
    assert files == {"README.md": False, "train/a.parquet": True, "unknown.xyz": True, "empty.bin": False}


def test_the_same_folder_again_is_no_new_commit_and_elsewhere_the_same_commit(tmp_path: Path, folder: Path) -> None:
    first = import_folder(tmp_path / "hub", "org/data", folder)
    assert import_folder(tmp_path / "hub", "org/data", folder, message="again") == first
    assert import_folder(tmp_path / "other", "else/where", folder) == first
    (folder / "train" / "a.parquet").write_bytes(b"PAR2")
    second = import_folder(tmp_path / "hub", "org/data", folder)
    assert second != first
    assert [commit.id for commit in Store(tmp_path / "hub").open("dataset", "org/data").history(second)] == [
        second,
        first,
    ]


def test_a_file_that_left_the_folder_leaves_the_branch_and_stays_in_history(tmp_path: Path, folder: Path) -> None:
    first = import_folder(tmp_path / "hub", "org/data", folder)
    (folder / "unknown.xyz").unlink()
    import_folder(tmp_path / "hub", "org/data", folder)
    assert tree(tmp_path / "hub").get("unknown.xyz") is None
    assert tree(tmp_path / "hub", revision=first).get("unknown.xyz") is not None


def test_single_files_are_added_replaced_and_deleted(tmp_path: Path) -> None:
    import_files(tmp_path / "hub", "org/data", {"a": b"1", "b": b"2"})
    import_files(tmp_path / "hub", "org/data", {"c": b"3"}, delete=["a"])
    assert [file.path for file in tree(tmp_path / "hub").files] == ["b", "c"]


def test_a_rule_decides_what_is_lfs(tmp_path: Path) -> None:
    import_files(
        tmp_path / "hub", "org/data", {"a.txt": b"1", "b.parquet": b"2"}, lfs=lambda path, size: path == "a.txt"
    )
    assert {file.path: file.lfs for file in tree(tmp_path / "hub").files} == {"a.txt": True, "b.parquet": False}


def test_a_link_that_leaves_the_folder_is_refused_and_no_ref_moves(tmp_path: Path, folder: Path) -> None:
    first = import_folder(tmp_path / "hub", "org/data", folder)
    (folder / "inside").symlink_to("README.md")
    second = import_folder(tmp_path / "hub", "org/data", folder)
    assert second != first
    (tmp_path / "secret").write_text("secret")
    (folder / "outside").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePath, match="outside"):
        import_folder(tmp_path / "hub", "org/data", folder)
    assert Store(tmp_path / "hub").open("dataset", "org/data").pin("main") == second


def test_what_is_no_file_is_refused(tmp_path: Path, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError, match="pipe"):
        import_folder(tmp_path / "hub", "org/data", folder)
    (folder / "pipe").unlink()
    (folder / "again").symlink_to("train")
    with pytest.raises(UsageError, match="again"):
        import_folder(tmp_path / "hub", "org/data", folder)


@pytest.mark.parametrize("path", ["../a", "/a", "a//b", "a/../b", "a\\b", "C:a", ".git/config", "", "a\nb", "\udc80"])
def test_an_unsafe_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UnsafePath):
        import_files(tmp_path / "hub", "org/data", {path: b""})


@pytest.mark.parametrize("repo", ["a/b/c", "a--b", "../x", "-a/b", "a/b.git", "a/", ""])
def test_an_impossible_repo_id_is_refused(tmp_path: Path, repo: str) -> None:
    with pytest.raises(UsageError):
        import_files(tmp_path / "hub", repo, {"a": b""})


@pytest.mark.parametrize("branch", ["../main", "a..b", "refs/../x", ".hidden", "a/", "0" * 40])
def test_an_impossible_branch_is_refused(tmp_path: Path, branch: str) -> None:
    with pytest.raises(UsageError):
        import_files(tmp_path / "hub", "org/data", {"a": b""}, branch=branch)


def test_a_folder_that_is_no_hub_is_left_alone(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="no Hub folder"):
        HubServer(folder)
    assert sorted(path.name for path in folder.iterdir()) == [".git", "README.md", "empty.bin", "train", "unknown.xyz"]


def test_missing_repos_and_revisions_are_named(tmp_path: Path) -> None:
    import_files(tmp_path / "hub", "org/data", {"a": b""})
    with pytest.raises(RepoNotFound):
        delete_repo(tmp_path / "hub", "org/other")
    with pytest.raises(RevisionNotFound, match="main"):
        create_tag(tmp_path / "hub", "org/data", "v1", at="nope")
    import_files(tmp_path / "hub", "org/other", {"a": b""})
    with pytest.raises(UsageError, match="already"):
        rename_repo(tmp_path / "hub", "org/data", "org/other")


def test_nothing_temporary_stays_after_an_import(tmp_path: Path, folder: Path) -> None:
    import_folder(tmp_path / "hub", "org/data", folder)
    assert list((tmp_path / "hub" / "tmp").iterdir()) == []


class Cursor(str):
    """Compares in Python, so that comparing it with a whole listing inside a built-in is seen as well."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other)

    def __lt__(self, other: str) -> bool:
        return str.__lt__(self, other)

    def __gt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def steps_of(work: Callable[[], object]) -> int:
    """Bytecodes that Python runs for `work`: the same on every machine, however busy it is."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


@pytest.mark.parametrize("recursive", [True, False])
def test_a_page_of_a_big_tree_costs_no_walk_over_it(recursive: bool) -> None:
    def cost(files: int) -> int:
        snapshot = Snapshot(FileEntry(f"data/{n:06}.txt", 1, "0" * 64, "0" * 40, False) for n in range(files))
        seen: list[str] = []

        def read() -> None:
            cursor = f"data/{files // 2 - 1:06}.txt"
            for _ in range(20):
                page = snapshot.page("data", recursive=recursive, after=Cursor(cursor), limit=10)
                assert page is not None
                assert page.cursor is not None
                cursor = page.cursor
                seen.extend(entry.path for entry in page.entries)

        steps = steps_of(read)
        assert seen == [f"data/{files // 2 + n:06}.txt" for n in range(200)]
        return steps

    assert cost(100_000) < 4 * cost(1_000)  # 100 times would be a walk a page; looking up grows by a few steps


def test_a_client_that_leaves_is_counted_and_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with HubServer(tmp_path / "hub") as server:
        import_files(tmp_path / "hub", "org/data", {"a.bin": bytes(32 << 20)})
        url = f"{server.endpoint}/datasets/org/data/resolve/main/a.bin"
        with httpx.stream("GET", url, follow_redirects=True) as reply:
            next(reply.iter_raw())
        record = server.log[-1]
        assert (record.origin, record.done) == ("cdn", True)
        assert 0 < record.sent < 32 << 20
        assert httpx.get(f"{server.endpoint}/api/datasets/org/data").status_code == 200
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


def test_serve_runs_until_a_signal(tmp_path: Path) -> None:
    script = (
        "import sys; from crucible.hub.server import serve; "
        "serve(sys.argv[1], port=0, ready=lambda hub: print(hub.endpoint, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "hub")], stdout=subprocess.PIPE, text=True
    ) as own:
        try:
            assert own.stdout is not None
            assert httpx.get(own.stdout.readline().strip() + "/api/datasets").json() == []
            own.terminate()
            assert own.wait(20) == 0
        finally:
            own.kill()


def test_an_import_is_seen_by_a_running_server(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as server:
        sha = import_files(tmp_path / "hub", "org/data", {"a.txt": b"a"})
        assert httpx.get(f"{server.endpoint}/api/datasets/org/data").json()["sha"] == sha
