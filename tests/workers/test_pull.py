"""A repo in the Hub cache: brought by us or by the official client, used by both, at the same time if need be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import crucible
from crucible import errors, session
from crucible.cache.blobs import BlobFolder
from crucible.cache.hubcache import HubCache
from crucible.config import Settings
from crucible.hashing import hasher_for
from crucible.hub.client import HubRepo
from crucible.hub.server import HubOptions, User, create_branch, create_pr
from crucible.refs import RepoRef, SourceFile
from crucible.report import Progress
from crucible.workers.pull import GIVE_UP_AFTER, PullReport, wanted
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import client_env, run_client, start_client

CARD = b"---\nlicense: mit\n---\n"
BIG = os.urandom(3 << 20)
LINES = b"".join(b'{"n": %d}\n' % n for n in range(40_000))
FILES: dict[str, bytes | Path] = {
    "README.md": CARD,
    "data/train.jsonl": LINES,
    "extra/big.bin": BIG,
    "extra/same.bin": BIG,
    "empty.txt": b"",
    **{f"small/{number}.txt": b"%d" % number for number in range(30)},
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HOME of us and of the official client."""
    made = tmp_path / "client"
    made.mkdir()
    monkeypatch.setenv("HF_HOME", str(made))
    return made


@pytest.fixture
def repo(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    hub.import_files("org/data", FILES)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    return hub


def pulled(**options: object) -> PullReport:
    return session.pull("org/data", **options)  # type: ignore[arg-type]


def blob_names_are_true(home: Path) -> None:
    """Every blob that can be seen by its name has the bytes that the name says (checklist 47)."""
    for path in (home / "hub").glob("*/blobs/*"):
        if path.name.endswith(".incomplete"):
            continue
        hasher = hasher_for(SourceFile("", path.stat().st_size, "", len(path.name) == 64))
        hasher.update(path.read_bytes())
        assert hasher.hexdigest() == path.name


def test_a_pull_brings_every_file_once_and_the_second_asks_once_or_never(repo: FaultyHub, home: Path) -> None:
    report = pulled()
    folder = Path(report.path)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert (report.files, report.size) == (len(FILES), sum(len(data) for data in FILES.values()))  # type: ignore[arg-type]
    assert report.counts.requests == len(repo.log)
    fetched = [record.path for record in repo.requests("*/resolve/*")]
    assert len(fetched) == len(FILES) - 2, "the same content comes once, an empty file needs no request"
    assert repo.bytes_sent(origin="cdn") == len(BIG)
    blob_names_are_true(home)
    repo.clear_log()
    again = pulled()
    assert (len(repo.log), again.counts.requests, again.reused_files) == (1, 1, len(FILES))
    repo.clear_log()
    assert pulled(revision=report.commit).path == report.path
    assert repo.log == []


def test_the_official_client_uses_what_we_pulled_without_a_download(repo: FaultyHub, home: Path) -> None:
    report = pulled()
    repo.clear_log()
    run_client(
        repo,
        home,
        f"""
        import pathlib
        from huggingface_hub import HfApi, hf_hub_download, scan_cache_dir, snapshot_download
        assert hf_hub_download("org/data", "extra/big.bin", repo_type="dataset", revision={report.commit!r})
        path = snapshot_download("org/data", repo_type="dataset", revision={report.commit!r})
        assert path == {report.path!r}, path
        """,
    )
    assert repo.log == [], "by commit the official client asks for nothing"
    run_client(
        repo,
        home,
        f"""
        from huggingface_hub import HfApi, hf_hub_download, scan_cache_dir, snapshot_download
        assert snapshot_download("org/data", repo_type="dataset") == {report.path!r}
        assert hf_hub_download("org/data", "extra/big.bin", repo_type="dataset")
        assert snapshot_download("org/data", repo_type="dataset", local_files_only=True) == {report.path!r}
        info = scan_cache_dir()
        assert info.warnings == [] and not info.incomplete_files, info.warnings
        result = HfApi().verify_repo_checksums("org/data", repo_type="dataset")
        assert not result.mismatches and not result.missing_paths and not result.extra_paths, result
        assert result.checked_count == {len(FILES)}, result
        """,
    )
    assert repo.bytes_sent() == 0
    assert repo.requests("*/resolve/*", method="GET") == []
    run_client(
        repo,
        home,
        f"""
        from huggingface_hub import scan_cache_dir
        scan_cache_dir().delete_revisions({report.commit!r}).execute()
        assert not scan_cache_dir().repos
        """,
    )
    assert not list((home / "hub").glob("datasets--*"))
    assert pulled().reused_files == 0


def test_we_use_what_the_official_client_downloaded(repo: FaultyHub, home: Path) -> None:
    run_client(
        repo,
        home,
        """
        from huggingface_hub import hf_hub_download, snapshot_download
        snapshot_download("org/data", repo_type="dataset")
        """,
    )
    repo.clear_log()
    report = pulled(verify=True)
    assert (report.reused_files, report.replaced, len(repo.log)) == (len(FILES), (), 1), "its listing is used too"
    repo.clear_log()
    assert len(crucible.load_dataset("org/data", split="train")) == 40_000
    assert [record.path for record in repo.requests("*/resolve/*")] == [
        f"/datasets/org/data/resolve/{report.commit}/README.md"
    ]


def test_a_file_the_official_client_got_by_itself_is_not_fetched_again(repo: FaultyHub, home: Path) -> None:
    run_client(
        repo,
        home,
        "from huggingface_hub import hf_hub_download\n"
        "hf_hub_download('org/data', 'extra/big.bin', repo_type='dataset')",
    )
    repo.clear_log()
    report = pulled()
    assert (report.reused_files, report.reused_bytes) == (2, 2 * len(BIG)), "at both its paths"
    assert repo.requests("*.bin") == []


def test_a_cache_without_links_is_used_and_filled(repo: FaultyHub, home: Path) -> None:
    run_client(
        repo,
        home,
        """
        from huggingface_hub import snapshot_download
        snapshot_download("org/data", repo_type="dataset", allow_patterns="extra/big.bin")
        """,
        HF_HUB_DISABLE_SYMLINKS="1",
    )
    big = next((home / "hub").glob("*/snapshots/*/extra/big.bin"))
    assert not big.is_symlink()
    repo.clear_log()
    assert pulled(include=["extra/big.bin"]).reused_files == 1
    assert len(repo.log) == 1
    assert (Path(pulled().path) / "extra" / "same.bin").read_bytes() == BIG


def test_a_broken_copy_is_found_when_it_is_used_and_replaced_only_when_asked(
    repo: FaultyHub, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = pulled()
    blob = (Path(report.path) / "data" / "train.jsonl").resolve()
    blob.write_bytes(LINES[:-2] + b"]\n")
    repo.clear_log()
    assert len(crucible.load_dataset("org/data", split="train")) == 40_000
    assert len(repo.requests("*train.jsonl", origin="hub")) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "train.jsonl" in caplog.text
    assert blob.read_bytes().endswith(b"]\n"), "it is somebody else's: left alone"
    assert pulled().reused_files == len(FILES), "a size is all that is looked at"
    repaired = pulled(verify=True)
    assert (repaired.replaced, repaired.reused_files) == (("data/train.jsonl",), len(FILES) - 1)
    blob_names_are_true(home)
    blob.write_bytes(b"x" * len(LINES))
    with pytest.raises(errors.OfflineMode, match=r"data/train\.jsonl"):
        offline(verify=True)
    assert blob.exists(), "offline nothing could take its place"


def offline(**options: object) -> PullReport:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return pulled(**options)
    finally:
        del os.environ["HF_HUB_OFFLINE"]


def test_patterns_are_the_official_clients(repo: FaultyHub, home: Path) -> None:
    cases: list[tuple[list[str], list[str]]] = [
        (["*.bin"], []),
        (["small/"], ["*/1*"]),
        (["SMALL/*"], []),
        (["extra\\big.bin", "README*"], []),
        ([], ["small/", "*.md"]),
        (["*.txt"], ["empty.txt"]),
        (["[a-e]*"], []),
    ]
    said = run_client(
        repo,
        home,
        f"""
        import json
        from huggingface_hub.utils import filter_repo_objects
        print(json.dumps([
            sorted(filter_repo_objects({list(FILES)!r}, allow_patterns=a or None, ignore_patterns=i or None))
            for a, i in {cases!r}
        ]))
        """,
    )
    assert [sorted(wanted(FILES, include, exclude)) for include, exclude in cases] == json.loads(said)
    report = pulled(include=["small/"], exclude=["*/1*"])
    assert report.files == 19
    assert len(repo.requests("*/resolve/*")) == 19
    with pytest.raises(errors.UsageError, match="none of its 35 files"):
        pulled(include=["nothing*"])


def test_a_file_that_fails_is_named_and_the_others_are_kept(repo: FaultyHub, home: Path) -> None:
    commit = pulled(include=["README.md"]).commit
    repo.import_files("org/data", {"README.md": b"moved on"})
    repo.add("flip", path="*big.bin", origin="cdn")
    repo.add("status", path="*/small/7.txt", status=404)
    with pytest.raises(errors.PullIncomplete, match=r"3 files did not come.*extra/big\.bin.*small/7\.txt") as caught:
        pulled()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "extra/big.bin",
        "extra/same.bin",
        "small/7.txt",
    ]
    assert len(list((home / "hub").glob("*/snapshots/*/small/*"))) == 29
    blob_names_are_true(home)
    assert HubCache(home / "hub").ref(RepoRef("org/data")) == commit, "the ref stays at what is whole"
    repo.clear_faults()
    repo.clear_log()
    assert pulled().reused_files == len(FILES) - 3
    assert len(repo.requests("*/resolve/*")) == 2
    run_client(
        repo,
        home,
        "from huggingface_hub import snapshot_download\n"
        "snapshot_download('org/data', repo_type='dataset', local_files_only=True)",
    )


def test_a_hub_that_is_down_is_not_asked_for_every_file(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.import_files("org/data", {f"{number:03}.txt": b"%d" % number for number in range(300)})
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_TRIES", "1")
    hub.add("status", path="*/resolve/*", status=503)
    hub.add("status", path="*.git/*", status=503)
    with pytest.raises(errors.PullIncomplete, match="300 files did not come"):
        pulled()
    assert len(hub.requests("*/resolve/*")) < 4 * GIVE_UP_AFTER


def test_an_error_of_the_repo_is_told_as_such(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.import_files("org/gated", {f"{number}.txt": b"x%d" % number for number in range(5)}, gated="auto")
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    with pytest.raises(errors.GatedRepo):
        session.pull("org/gated")
    with pytest.raises(errors.RepoNotFound):
        session.pull("org/nothing")
    with pytest.raises(errors.RevisionNotFound, match="main"):
        session.pull("org/gated", revision="nope")
    with pytest.raises(errors.UsageError, match="folder"):
        session.pull("./somewhere")


def test_models_and_branches_land_where_the_official_client_looks(hub: FaultyHub, home: Path) -> None:
    hub.import_files("org/net", {"config.json": b"{}"}, repo_type="model")
    hub.import_files("org/data", FILES)
    create_pr(hub.root, "org/data", 3)
    model = session.pull("org/net", repo_type="model", endpoint=hub.endpoint)
    pr = session.pull("org/data", revision="refs/pr/3", endpoint=hub.endpoint)
    run_client(
        hub,
        home,
        f"""
        from huggingface_hub import snapshot_download
        assert snapshot_download("org/net") == {model.path!r}
        assert snapshot_download("org/data", repo_type="dataset", revision="refs/pr/3") == {pr.path!r}
        """,
        HF_HUB_OFFLINE="1",
    )


def test_offline_a_pull_gives_what_is_there_or_names_what_is_not(repo: FaultyHub, home: Path) -> None:
    with pytest.raises(errors.OfflineMode, match="org/data@main"):
        offline()
    report = pulled(exclude=["small/1*"])
    repo.clear_log()
    assert offline(exclude=["small/1*"]).path == report.path
    with pytest.raises(errors.OfflineMode, match=r"small/1\.txt, small/10\.txt.* and 6 more"):
        offline()
    assert repo.log == []


def test_offline_what_was_pulled_loads_and_half_of_it_does_not(repo: FaultyHub, home: Path) -> None:
    """In a process that cannot open a socket at all."""
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
        "import crucible\n"
        "from crucible import session\n"
        "from crucible.cli.app import cli\n"
    )

    def run(code: str) -> str:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script + code], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert "a socket was opened" not in done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout

    failing = (
        "try: crucible.load_dataset('org/data')\n"
        "except crucible.errors.OfflineMode as error: print('refused', error)\n"
        "else: print('loaded')"
    )
    assert run(failing).startswith("refused org/data@main")
    report = pulled(include=["README.md"])
    assert "train.jsonl" in run(failing), "the listing is known, so it is known what lacks"
    pulled()
    repo.clear_log()
    head = run("cli(['data', 'head', 'org/data', '-n', '2', '--json'], standalone_mode=False)")
    assert head.splitlines() == ['{"n": 0}', '{"n": 1}']
    assert run("print(len(crucible.load_dataset('org/data', split='train')))").strip() == "40000"
    assert run("cli(['hub', 'pull', 'org/data', '-q'], standalone_mode=False)").strip() == report.path
    assert repo.log == []


def test_a_snapshot_without_a_listing_is_given_offline_but_not_taken_for_a_dataset(repo: FaultyHub, home: Path) -> None:
    run_client(
        repo,
        home,
        "from huggingface_hub import hf_hub_download\n"
        "hf_hub_download('org/data', 'data/train.jsonl', repo_type='dataset')",
    )
    report = offline()
    assert (report.files, report.listed) == (1, False)
    with pytest.raises(errors.OfflineMode):
        offline_load()


def offline_load() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        crucible.load_dataset("org/data")
    finally:
        del os.environ["HF_HUB_OFFLINE"]


def test_a_cache_that_cannot_be_written_is_enough_when_all_is_there(
    repo: FaultyHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = pulled()
    shutil.rmtree(HubCache(home / "hub").folder(RepoRef("org/data")) / "trees")

    def full_of_no(*_: object) -> None:
        raise errors.StoreReadOnly(str(home))

    monkeypatch.setattr(HubCache, "_write", full_of_no)
    create_branch(repo.root, "org/data", "same")
    assert pulled(revision="same").path == report.path
    (Path(report.path) / "README.md").resolve().unlink()
    monkeypatch.setattr(BlobFolder, "put", full_of_no)
    with pytest.raises(errors.StoreReadOnly):
        pulled()


def test_progress_ends_at_all_of_it(repo: FaultyHub, home: Path) -> None:
    told: list[Progress] = []
    report = pulled(on_progress=told.append)
    last = told[-1]
    assert (last.phase, last.items_done, last.items) == ("finished", len(FILES), len(FILES))
    assert last.bytes_done == last.bytes == report.size


def wait_for(condition: Callable[[], bool], most_s: float = 30.0) -> None:
    until = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


PULL = "from crucible import session; print(session.pull('org/data').path)"
SNAPSHOT = """
    from huggingface_hub import snapshot_download
    print(snapshot_download("org/data", repo_type="dataset"))
"""


def test_two_clients_at_once_on_one_cache_download_once(repo: FaultyHub, home: Path) -> None:
    """Ours and the official one, whoever is first at which file."""
    repo.add("slow", path="/blobs/*", origin="cdn", piece=200_000, wait=0.05)
    for _ in range(2):
        ours = subprocess.Popen(
            [sys.executable, "-c", PULL],
            env={**os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        theirs = start_client(repo, home, SNAPSHOT)
        try:
            said = [process.communicate(timeout=100)[0].strip().splitlines()[-1] for process in (ours, theirs)]
        finally:
            for process in (ours, theirs):
                process.kill()
                process.wait(timeout=10)
        assert said[0] == said[1], said
        assert repo.bytes_sent() == len(BIG)
        assert {len(repo.requests(f"*/{path}", origin="hub", method="GET")) for path in FILES if "small" in path} == {1}
    blob_names_are_true(home)
    run_client(repo, home, "from huggingface_hub import scan_cache_dir\nassert scan_cache_dir().warnings == []")


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_the_second_waits_for_the_first_and_downloads_nothing(repo: FaultyHub, home: Path, first: str) -> None:
    repo.add("slow", path="/blobs/*", origin="cdn", piece=300_000, wait=0.1)

    def ours() -> subprocess.Popen[str]:
        code = "from crucible import session; session.pull('org/data', include=['extra/big.bin'])"
        return subprocess.Popen([sys.executable, "-c", code], env=client_env(repo, home))

    def theirs() -> subprocess.Popen[str]:
        return start_client(
            repo,
            home,
            "from huggingface_hub import hf_hub_download\n"
            "hf_hub_download('org/data', 'extra/big.bin', repo_type='dataset')",
        )

    starts = [ours, theirs] if first == "ours" else [theirs, ours]
    processes = [starts[0]()]
    try:
        wait_for(lambda: bool(list((home / "hub").glob("*/blobs/*.incomplete"))))
        processes.append(starts[1]())
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)
    assert repo.bytes_sent() == len(BIG)
    blob_names_are_true(home)
    assert not list((home / "hub").glob("*/blobs/*.incomplete"))


def test_a_killed_pull_leaves_what_the_official_client_can_prune_and_we_go_on_with(repo: FaultyHub, home: Path) -> None:
    slow = repo.add("slow", path="/blobs/*", origin="cdn", piece=100_000, wait=0.05)
    process = subprocess.Popen([sys.executable, "-c", PULL], env={**os.environ})
    try:
        wait_for(lambda: bool(repo.hits(slow)) and bool(list((home / "hub").glob("*/blobs/*.incomplete"))))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=10)
    repo.clear_faults()
    run_client(
        repo,
        home,
        """
        from huggingface_hub import scan_cache_dir, snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError
        info = scan_cache_dir()
        assert info.warnings == [] and info.incomplete_files, "what is on its way is known as such"
        try:
            snapshot_download("org/data", repo_type="dataset", local_files_only=True)
        except (IncompleteSnapshotError, LocalEntryNotFoundError):
            pass
        else:
            raise AssertionError("half a snapshot passed for one")
        """,
    )
    pulled()
    blob_names_are_true(home)
    left = [path for path in (home / "hub").glob("*/blobs/*.incomplete") if path.stat().st_size > 1 << 20]
    assert left == [], "what a big file's download left was taken over"
    run_client(repo, home, "from huggingface_hub import scan_cache_dir\nassert scan_cache_dir().warnings == []")


def test_what_a_killed_pull_left_is_freed_by_the_official_prune(repo: FaultyHub, home: Path) -> None:
    repo.add("stall", path="/blobs/*", origin="cdn", after=2_000_000)
    code = "from crucible import session; session.pull('org/data', include=['extra/big.bin'])"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    try:
        wait_for(lambda: any(p.stat().st_size > 1 << 20 for p in (home / "hub").glob("*/blobs/*.incomplete")))
    finally:
        process.kill()
        process.wait(timeout=10)
    run_client(
        repo,
        home,
        """
        import subprocess, sys
        done = subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", "cache", "prune", "--yes"],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        """,
    )
    assert not list((home / "hub").glob("*/blobs/*.incomplete"))
    repo.clear_faults()
    assert pulled(include=["extra/big.bin"]).files == 1


def test_paths_of_a_hostile_listing_are_refused_before_anything_is_written(
    repo: FaultyHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evil(_: object, ref: RepoRef) -> list[SourceFile]:
        return [SourceFile("fine.txt", 0, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", False), hostile]

    monkeypatch.setattr(HubRepo, "files", evil)
    for path in ("../../../../evil", "/tmp/evil", "a\\..\\..\\evil", "C:/evil", "a/../../evil"):
        hostile = SourceFile(path, 0, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", False)
        with pytest.raises(errors.UnsafePath):
            pulled()
    assert not (home / "hub").exists()


def test_a_listing_with_a_hash_that_is_a_path_is_no_listing(
    repo: FaultyHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = {"type": "file", "path": "a", "oid": "../" * 13 + "x", "size": 1}
    monkeypatch.setattr(HubRepo, "_json", lambda self, url, ref: ([evil], None))
    with pytest.raises(errors.SourceUnavailable, match="absurd"):
        pulled(revision="a" * 40)
    assert not (home / "hub").exists()


def test_no_token_reaches_the_cdn_and_mirrors_get_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = HubOptions(tokens={"hf_anna": User("anna", ("org",))})
    with FaultyHub(tmp_path / "private", options=options) as hub:
        hub.import_files("org/data", FILES, private=True)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(errors.RepoNotFound):
            pulled()
        assert session.pull("org/data", token="hf_anna").files == len(FILES)
        assert hub.requests(origin="cdn")
        assert not any(record.had_token for record in hub.requests(origin="cdn"))


def test_the_cache_of_another_folder(repo: FaultyHub, tmp_path: Path) -> None:
    report = pulled(cache_dir=tmp_path / "elsewhere")
    assert Path(report.path).is_relative_to(tmp_path / "elsewhere")
    assert not Settings.from_env().hub_cache.exists()
