"""A pull: what it brings, counts, refuses and says; with errors on the way, and offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crucible
from crucible import errors, session
from crucible.cache.blobs import BlobFolder
from crucible.cache.hubcache import HubCache
from crucible.config import Settings
from crucible.hub.client import HubRepo
from crucible.hub.server import HubOptions, User, create_branch, create_pr
from crucible.refs import RepoRef, SourceFile
from crucible.report import Progress
from crucible.workers.pull import GIVE_UP_AFTER, wanted
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client
from tests.workers.pull_cases import (
    BIG,
    FILES,
    SIZES,
    blob_names_are_true,
    offline,
    pulled,
    pulled_offline,
)


def test_a_pull_brings_every_file_once_and_the_second_asks_once_or_never(org_data: FaultyHub, hf_home: Path) -> None:
    report = pulled()
    folder = Path(report.path)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert (report.files, report.size) == (len(FILES), sum(SIZES.values()))
    assert report.counts.requests == len(org_data.log)
    fetched = [record.path for record in org_data.requests("*/resolve/*")]
    assert len(fetched) == len(FILES) - 2, "the same content comes once, an empty file needs no request"
    assert org_data.bytes_sent(origin="cdn") == len(BIG)
    blob_names_are_true(hf_home)
    org_data.clear_log()
    again = pulled()
    assert (len(org_data.log), again.counts.requests, again.reused_files) == (1, 1, len(FILES))
    org_data.clear_log()
    assert pulled(revision=report.commit).path == report.path
    assert org_data.log == []


def test_patterns_are_the_official_clients(org_data: FaultyHub, hf_home: Path) -> None:
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
        org_data,
        hf_home,
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
    assert len(org_data.requests("*/resolve/*")) == 19
    with pytest.raises(errors.UsageError, match="none of its 35 files"):
        pulled(include=["nothing*"])


def test_a_file_that_fails_is_named_and_the_others_are_kept(org_data: FaultyHub, hf_home: Path) -> None:
    commit = pulled(include=["README.md"]).commit
    org_data.import_files("org/data", {"README.md": b"moved on"})
    org_data.add("flip", path="*big.bin", origin="cdn")
    org_data.add("status", path="*/small/7.txt", status=404)
    with pytest.raises(errors.PullIncomplete, match=r"3 files did not come.*extra/big\.bin.*small/7\.txt") as caught:
        pulled()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "extra/big.bin",
        "extra/same.bin",
        "small/7.txt",
    ]
    assert len(list((hf_home / "hub").glob("*/snapshots/*/small/*"))) == 29
    blob_names_are_true(hf_home)
    assert HubCache(hf_home / "hub").ref(RepoRef("org/data")) == commit, "the ref stays at what is whole"
    org_data.clear_faults()
    org_data.clear_log()
    assert pulled().reused_files == len(FILES) - 3
    assert len(org_data.requests("*/resolve/*")) == 2
    run_client(
        org_data,
        hf_home,
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


def test_models_and_branches_land_where_the_official_client_looks(hub: FaultyHub, hf_home: Path) -> None:
    hub.import_files("org/net", {"config.json": b"{}"}, repo_type="model")
    hub.import_files("org/data", FILES)
    create_pr(hub.root, "org/data", 3)
    model = session.pull("org/net", repo_type="model", endpoint=hub.endpoint)
    pr = session.pull("org/data", revision="refs/pr/3", endpoint=hub.endpoint)
    run_client(
        hub,
        hf_home,
        f"""
        from huggingface_hub import snapshot_download
        assert snapshot_download("org/net") == {model.path!r}
        assert snapshot_download("org/data", repo_type="dataset", revision="refs/pr/3") == {pr.path!r}
        """,
        HF_HUB_OFFLINE="1",
    )


def test_offline_a_pull_gives_what_is_there_or_names_what_is_not(org_data: FaultyHub, hf_home: Path) -> None:
    with pytest.raises(errors.OfflineMode, match="org/data@main"):
        pulled_offline()
    report = pulled(exclude=["small/1*"])
    org_data.clear_log()
    assert pulled_offline(exclude=["small/1*"]).path == report.path
    with pytest.raises(errors.OfflineMode, match=r"small/1\.txt, small/10\.txt.* and 6 more"):
        pulled_offline()
    assert org_data.log == []


def test_offline_what_was_pulled_loads_and_half_of_it_does_not(org_data: FaultyHub, hf_home: Path) -> None:
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
    org_data.clear_log()
    head = run("cli(['data', 'head', 'org/data', '-n', '2', '--json'], standalone_mode=False)")
    assert head.splitlines() == ['{"n": 0}', '{"n": 1}']
    assert run("print(len(crucible.load_dataset('org/data', split='train')))").strip() == "40000"
    assert run("cli(['hub', 'pull', 'org/data', '-q'], standalone_mode=False)").strip() == report.path
    assert org_data.log == []


def test_offline_and_online_make_the_same_manifest(
    hub: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [f"data/{part}/train-{n}.jsonl" for part in ("a", "A", "a.b", "é") for n in (10, 9)]
    hub.import_files("org/data", {name: b'{"a": "%d"}\n' % number * 9 for number, name in enumerate(names)}, lfs=True)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    online = crucible.load_dataset("org/data", split="train")
    pulled()
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "another"))
    with offline():
        loaded = crucible.load_dataset("org/data", split="train")
    assert isinstance(online, crucible.Dataset)
    assert isinstance(loaded, crucible.Dataset)
    assert loaded.manifest.id == online.manifest.id


def test_a_snapshot_without_a_listing_is_given_offline_but_not_taken_for_a_dataset(
    org_data: FaultyHub, hf_home: Path
) -> None:
    run_client(
        org_data,
        hf_home,
        "from huggingface_hub import hf_hub_download\n"
        "hf_hub_download('org/data', 'data/train.jsonl', repo_type='dataset')",
    )
    report = pulled_offline()
    assert (report.files, report.listed) == (1, False)
    with offline(), pytest.raises(errors.OfflineMode):
        crucible.load_dataset("org/data")


def test_a_cache_that_cannot_be_written_is_enough_when_all_is_there(
    org_data: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = pulled()
    shutil.rmtree(HubCache(hf_home / "hub").folder(RepoRef("org/data")) / "trees")

    def full_of_no(*_: object) -> None:
        raise errors.StoreReadOnly(str(hf_home))

    monkeypatch.setattr(HubCache, "_write", full_of_no)
    create_branch(org_data.root, "org/data", "same")
    assert pulled(revision="same").path == report.path
    (Path(report.path) / "README.md").resolve().unlink()
    monkeypatch.setattr(BlobFolder, "put", full_of_no)
    with pytest.raises(errors.StoreReadOnly):
        pulled()


def test_progress_ends_at_all_of_it(org_data: FaultyHub, hf_home: Path) -> None:
    told: list[Progress] = []
    report = pulled(on_progress=told.append)
    last = told[-1]
    assert (last.phase, last.items_done, last.items) == ("finished", len(FILES), len(FILES))
    assert last.bytes_done == last.bytes == report.size


def test_paths_of_a_hostile_listing_are_refused_before_anything_is_written(
    org_data: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evil(_: object, ref: RepoRef) -> list[SourceFile]:
        return [SourceFile("fine.txt", 0, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", False), hostile]

    monkeypatch.setattr(HubRepo, "files", evil)
    for path in ("../../../../evil", "/tmp/evil", "a\\..\\..\\evil", "C:/evil", "a/../../evil"):
        hostile = SourceFile(path, 0, "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", False)
        with pytest.raises(errors.UnsafePath):
            pulled()
    assert not (hf_home / "hub").exists()


def test_a_listing_with_a_hash_that_is_a_path_is_no_listing(
    org_data: FaultyHub, hf_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = {"type": "file", "path": "a", "oid": "../" * 13 + "x", "size": 1}
    monkeypatch.setattr(HubRepo, "_json", lambda self, url, ref: ([evil], None))
    with pytest.raises(errors.SourceUnavailable, match="absurd"):
        pulled(revision="a" * 40)
    assert not (hf_home / "hub").exists()


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


def test_the_cache_of_another_folder(org_data: FaultyHub, tmp_path: Path) -> None:
    report = pulled(cache_dir=tmp_path / "elsewhere")
    assert Path(report.path).is_relative_to(tmp_path / "elsewhere")
    assert not Settings.from_env().hub_cache.exists()
