"""`crucible hub pull` and `prefetch --keep-raw` as a person or a script meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from crucible.cli.app import cli
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client

FILES: dict[str, bytes | Path] = {
    "README.md": b"---\nlicense: mit\n---\n",
    "train.jsonl": b"".join(b'{"n": %d}\n' % n for n in range(100)),
    "w.bin": b"w" * 2_000_000,
}


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="crucible", env={"COLUMNS": "80"})


@pytest.fixture
def home(hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HOME beside a Hub with `org/data`."""
    hub.import_files("org/data", FILES)
    made = tmp_path / "client"
    made.mkdir()
    monkeypatch.setenv("HF_HOME", str(made))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    return made


def test_the_path_is_all_that_stdout_says_and_it_is_where_the_official_command_says(hub: FaultyHub, home: Path) -> None:
    done = run("hub", "pull", "org/data")
    assert (done.exit_code, done.stdout.count("\n")) == (0, 1)
    path = Path(done.stdout.strip())
    assert {name: (path / name).read_bytes() for name in FILES} == FILES
    assert "3 files, 1.9 MiB; 3 fetched (1.9 MiB); 6 requests" in done.stderr
    official = run_client(
        hub,
        home,
        "import sys; from huggingface_hub.cli.hf import main\n"
        "sys.argv = ['hf', 'download', 'org/data', '--repo-type', 'dataset', '--quiet']; main()",
    )
    assert official.strip() == str(path)
    again = run("hub", "pull", "org/data")
    assert (again.stdout, again.exit_code) == (done.stdout, 0)
    assert "3 here already; 1 request" in again.stderr
    assert run("hub", "pull", "org/data", "-q").stderr == ""


def test_json_names_what_came_and_what_was_here(hub: FaultyHub, home: Path) -> None:
    first = run("hub", "pull", "org/data", "--include", "*.jsonl", "--include", "*.md", "--json", "-q")
    report = json.loads(first.stdout)
    commit = report["commit"]
    assert (report["repo"], report["repo_type"], report["revision"], len(commit)) == ("org/data", "dataset", "main", 40)
    assert (report["files"], report["reused_files"], report["listed"], report["replaced"]) == (2, 0, True, [])
    assert report["requests"] == report["counts"]["hub_requests"] == len(hub.log)
    hub.clear_log()
    second = json.loads(run("hub", "pull", "org/data", "--revision", commit, "--json", "-q").stdout)
    assert (second["reused_files"], second["files"], second["path"]) == (2, 3, report["path"])
    assert [record.path.rpartition("/")[2] for record in hub.requests(origin="hub")] == ["w.bin"]


def test_verify_replaces_what_is_wrong(hub: FaultyHub, home: Path) -> None:
    path = Path(run("hub", "pull", "org/data", "-q").stdout.strip())
    (path / "w.bin").resolve().write_bytes(b"W" * 2_000_000)
    assert run("hub", "pull", "org/data").exit_code == 0
    assert (path / "w.bin").read_bytes() == b"W" * 2_000_000
    mended = run("hub", "pull", "org/data", "--verify")
    assert "1 of them because they were wrong here: w.bin" in mended.stderr
    assert (path / "w.bin").read_bytes() == FILES["w.bin"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("org/nothing",), 1, "org/nothing: no such repo"),
        (("org/data", "--revision", "v9"), 1, "no revision 'v9'"),
        (("org/data", "--type", "model"), 1, "no such repo"),
        (("org/data", "--type", "bucket"), 2, "bucket"),
        (("./here",), 2, "is a folder"),
        (("org/data", "--include", "*.zip"), 2, "none of its 3 files"),
        (("org data",), 2, "namespace/name"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code(
    hub: FaultyHub, home: Path, args: tuple[str, ...], code: int, said: str
) -> None:
    done = run("hub", "pull", "-q", *args)
    assert done.exit_code == code
    assert done.stdout == ""
    assert said in done.stderr


def test_a_file_that_fails_ends_with_1_and_names_it(hub: FaultyHub, home: Path) -> None:
    hub.add("flip", path="*/w.bin", origin="cdn")
    hub.add("flip", path="/blobs/*", origin="cdn")
    done = run("hub", "pull", "org/data", "-q")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "1 file did not come, the others are kept" in done.stderr
    assert "w.bin" in done.stderr
    hub.clear_faults()
    hub.clear_log()
    assert run("hub", "pull", "org/data", "-q").exit_code == 0
    assert len(hub.requests("*/resolve/*")) == 1


def test_offline_a_pulled_repo_is_named_and_a_missing_one_is_an_error(hub: FaultyHub, home: Path) -> None:
    path = run("hub", "pull", "org/data", "-q").stdout
    hub.clear_log()
    assert run("--offline", "hub", "pull", "org/data", "-q").stdout == path
    lacking = run("--offline", "hub", "pull", "org/other", "-q")
    assert lacking.exit_code == 1
    assert "HF_HUB_OFFLINE" in lacking.stderr
    assert hub.log == []
