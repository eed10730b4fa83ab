"""One Hub cache with the official client: in turn, at the same time, after a kill, with a broken file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import crucible
from crucible import errors
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import client_env, run_client, start_client
from tests.workers.pull_cases import (
    BIG,
    FILES,
    LINES,
    blob_names_are_true,
    pulled,
    pulled_offline,
    wait_for,
)


def test_the_official_client_uses_what_we_pulled_without_a_download(org_data: FaultyHub, hf_home: Path) -> None:
    report = pulled()
    org_data.clear_log()
    run_client(
        org_data,
        hf_home,
        f"""
        import pathlib
        from huggingface_hub import HfApi, hf_hub_download, scan_cache_dir, snapshot_download
        assert hf_hub_download("org/data", "extra/big.bin", repo_type="dataset", revision={report.commit!r})
        path = snapshot_download("org/data", repo_type="dataset", revision={report.commit!r})
        assert path == {report.path!r}, path
        """,
    )
    assert org_data.log == [], "by commit the official client asks for nothing"
    run_client(
        org_data,
        hf_home,
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
    assert org_data.bytes_sent() == 0
    assert org_data.requests("*/resolve/*", method="GET") == []
    run_client(
        org_data,
        hf_home,
        f"""
        from huggingface_hub import scan_cache_dir
        scan_cache_dir().delete_revisions({report.commit!r}).execute()
        assert not scan_cache_dir().repos
        """,
    )
    assert not list((hf_home / "hub").glob("datasets--*"))
    assert pulled().reused_files == 0


def test_we_use_what_the_official_client_downloaded(org_data: FaultyHub, hf_home: Path) -> None:
    run_client(
        org_data,
        hf_home,
        """
        from huggingface_hub import hf_hub_download, snapshot_download
        snapshot_download("org/data", repo_type="dataset")
        """,
    )
    org_data.clear_log()
    report = pulled(verify=True)
    assert (report.reused_files, report.replaced, len(org_data.log)) == (len(FILES), (), 1), "its listing is used too"
    org_data.clear_log()
    assert len(crucible.load_dataset("org/data", split="train")) == 40_000
    assert [record.path for record in org_data.requests("*/resolve/*")] == [
        f"/datasets/org/data/resolve/{report.commit}/README.md"
    ]


def test_a_file_the_official_client_got_by_itself_is_not_fetched_again(org_data: FaultyHub, hf_home: Path) -> None:
    run_client(
        org_data,
        hf_home,
        "from huggingface_hub import hf_hub_download\n"
        "hf_hub_download('org/data', 'extra/big.bin', repo_type='dataset')",
    )
    org_data.clear_log()
    report = pulled()
    assert (report.reused_files, report.reused_bytes) == (2, 2 * len(BIG)), "at both its paths"
    assert org_data.requests("*.bin") == []


def test_a_cache_without_links_is_used_and_filled(org_data: FaultyHub, hf_home: Path) -> None:
    run_client(
        org_data,
        hf_home,
        """
        from huggingface_hub import snapshot_download
        snapshot_download("org/data", repo_type="dataset", allow_patterns="extra/big.bin")
        """,
        HF_HUB_DISABLE_SYMLINKS="1",
    )
    big = next((hf_home / "hub").glob("*/snapshots/*/extra/big.bin"))
    assert not big.is_symlink()
    org_data.clear_log()
    assert pulled(include=["extra/big.bin"]).reused_files == 1
    assert len(org_data.log) == 1
    assert (Path(pulled().path) / "extra" / "same.bin").read_bytes() == BIG


def test_a_broken_copy_is_found_when_it_is_used_and_replaced_only_when_asked(
    org_data: FaultyHub, hf_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = pulled()
    blob = (Path(report.path) / "data" / "train.jsonl").resolve()
    blob.write_bytes(LINES[:-2] + b"]\n")
    org_data.clear_log()
    assert len(crucible.load_dataset("org/data", split="train")) == 40_000
    assert len(org_data.requests("*train.jsonl", origin="hub")) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "train.jsonl" in caplog.text
    assert blob.read_bytes().endswith(b"]\n"), "it is somebody else's: left alone"
    assert pulled().reused_files == len(FILES), "a size is all that is looked at"
    repaired = pulled(verify=True)
    assert (repaired.replaced, repaired.reused_files) == (("data/train.jsonl",), len(FILES) - 1)
    blob_names_are_true(hf_home)
    blob.write_bytes(b"x" * len(LINES))
    with pytest.raises(errors.OfflineMode, match=r"data/train\.jsonl"):
        pulled_offline(verify=True)
    assert blob.exists(), "offline nothing could take its place"


SNAPSHOT = """
    from huggingface_hub import snapshot_download
    print(snapshot_download("org/data", repo_type="dataset"))
"""


def test_two_clients_at_once_on_one_cache_download_once(org_data: FaultyHub, hf_home: Path) -> None:
    """Ours and the official one, whoever is first at which file."""
    org_data.add("slow", path="/blobs/*", origin="cdn", piece=200_000, wait=0.05)
    for _ in range(2):
        ours = subprocess.Popen(
            [sys.executable, "-c", PULL],
            env={**os.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        theirs = start_client(org_data, hf_home, SNAPSHOT)
        try:
            said = [process.communicate(timeout=100)[0].strip().splitlines()[-1] for process in (ours, theirs)]
        finally:
            for process in (ours, theirs):
                process.kill()
                process.wait(timeout=10)
        assert said[0] == said[1], said
        assert org_data.bytes_sent() == len(BIG)
        # a small file takes no lock, which would cost more than the file: both may ask for one in the same moment
        for path in FILES:
            if "small" in path:
                assert 1 <= len(org_data.requests(f"*/{path}", origin="hub", method="GET")) <= 2
    blob_names_are_true(hf_home)
    run_client(org_data, hf_home, "from huggingface_hub import scan_cache_dir\nassert scan_cache_dir().warnings == []")


PULL = "from crucible import session; print(session.pull('org/data').path)"


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_the_second_waits_for_the_first_and_downloads_nothing(org_data: FaultyHub, hf_home: Path, first: str) -> None:
    org_data.add("slow", path="/blobs/*", origin="cdn", piece=300_000, wait=0.1)

    def ours() -> subprocess.Popen[str]:
        code = "from crucible import session; session.pull('org/data', include=['extra/big.bin'])"
        return subprocess.Popen([sys.executable, "-c", code], env=client_env(org_data, hf_home), text=True)

    def theirs() -> subprocess.Popen[str]:
        return start_client(
            org_data,
            hf_home,
            "from huggingface_hub import hf_hub_download\n"
            "hf_hub_download('org/data', 'extra/big.bin', repo_type='dataset')",
        )

    starts = [ours, theirs] if first == "ours" else [theirs, ours]
    processes = [starts[0]()]
    try:
        wait_for(lambda: bool(list((hf_home / "hub").glob("*/blobs/*.incomplete"))))
        processes.append(starts[1]())
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=10)
    assert org_data.bytes_sent() == len(BIG)
    blob_names_are_true(hf_home)
    assert not list((hf_home / "hub").glob("*/blobs/*.incomplete"))


def test_a_killed_pull_leaves_what_the_official_client_can_prune_and_we_go_on_with(
    org_data: FaultyHub, hf_home: Path
) -> None:
    slow = org_data.add("slow", path="/blobs/*", origin="cdn", piece=100_000, wait=0.05)
    process = subprocess.Popen([sys.executable, "-c", PULL], env={**os.environ})
    try:
        wait_for(lambda: bool(org_data.hits(slow)) and bool(list((hf_home / "hub").glob("*/blobs/*.incomplete"))))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=10)
    org_data.clear_faults()
    run_client(
        org_data,
        hf_home,
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
    blob_names_are_true(hf_home)
    left = [path for path in (hf_home / "hub").glob("*/blobs/*.incomplete") if path.stat().st_size > 1 << 20]
    assert left == [], "what a big file's download left was taken over"
    run_client(org_data, hf_home, "from huggingface_hub import scan_cache_dir\nassert scan_cache_dir().warnings == []")


def test_what_a_killed_pull_left_is_freed_by_the_official_prune(org_data: FaultyHub, hf_home: Path) -> None:
    org_data.add("stall", path="/blobs/*", origin="cdn", after=2_000_000)
    code = "from crucible import session; session.pull('org/data', include=['extra/big.bin'])"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
    try:
        wait_for(lambda: any(p.stat().st_size > 1 << 20 for p in (hf_home / "hub").glob("*/blobs/*.incomplete")))
    finally:
        process.kill()
        process.wait(timeout=10)
    run_client(
        org_data,
        hf_home,
        """
        import subprocess, sys
        done = subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", "cache", "prune", "--yes"],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        """,
    )
    assert not list((hf_home / "hub").glob("*/blobs/*.incomplete"))
    org_data.clear_faults()
    assert pulled(include=["extra/big.bin"]).files == 1
