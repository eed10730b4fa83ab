"""What a user does first, on a local Hub and without Ray: load, plan, make mistakes, go offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible import errors
from crucible.config import Settings, parse_size
from crucible.hub.server import HubOptions
from tests.hubserver.faults import FaultyHub

README = """---
configs:
- config_name: main
  default: true
  data_files:
  - split: train
    path: main/train*
  - split: test
    path: main/test*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/*
---
# A dataset
"""


def jsonl(rows: int, tag: str = "") -> bytes:
    return "".join(json.dumps({"id": i, "text": f"{tag}{i}"}) + "\n" for i in range(rows)).encode()


def parquet(folder: Path, rows: int, name: str = "x") -> Path:
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({"id": range(rows), "text": ["y" * 50] * rows}), path, row_group_size=100)
    return path


@pytest.fixture
def gsm(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    hub.import_files(
        "org/gsm",
        {
            "README.md": README.encode(),
            "main/train.jsonl": jsonl(70, "m"),
            "main/test.jsonl": jsonl(13, "t"),
            "socratic/train.jsonl": jsonl(70, "s"),
        },
    )
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.05")
    return hub


def test_a_repo_loads_whole_by_config_and_by_split(gsm: FaultyHub) -> None:
    whole = crucible.load_dataset("org/gsm")
    assert {name: len(split) for name, split in whole.items()} == {"train": 70, "test": 13}
    assert crucible.load_dataset("org/gsm", "socratic", split="train")[3] == {"id": 3, "text": "s3"}
    streamed = crucible.load_dataset("org/gsm", "main", split="test", streaming=True)
    assert [row["id"] for row in streamed] == list(range(13))


def test_a_second_load_costs_one_request_and_by_commit_none(gsm: FaultyHub) -> None:
    commit = crucible.load_dataset("org/gsm", split="train").manifest.repo.revision
    gsm.clear_log()
    crucible.load_dataset("org/gsm", split="train")
    assert len(gsm.log) == 1
    gsm.clear_log()
    crucible.load_dataset("org/gsm", split="train", revision=commit)
    assert gsm.log == []


def test_a_moved_branch_is_noticed_and_only_what_changed_is_fetched(gsm: FaultyHub) -> None:
    crucible.load_dataset("org/gsm")
    gsm.import_files("org/gsm", {"main/test.jsonl": jsonl(20, "new")})
    gsm.clear_log()
    assert {name: len(split) for name, split in crucible.load_dataset("org/gsm").items()} == {"train": 70, "test": 20}
    fetched = [record.path for record in gsm.log if "/resolve/" in record.path]
    assert [path.rpartition("/")[2] for path in fetched] == ["README.md", "test.jsonl"]


def test_offline_reads_what_is_here_and_opens_no_socket(gsm: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    crucible.load_dataset("org/gsm", "main", split="train")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    gsm.clear_log()
    assert len(crucible.load_dataset("org/gsm", split="train")) == 70
    with pytest.raises(errors.OfflineMode, match="split test"):
        crucible.load_dataset("org/gsm", split="test")
    with pytest.raises(errors.OfflineMode, match="org/other"):
        crucible.load_dataset("org/other")
    with pytest.raises(errors.SplitNotFound, match="train, test"):
        crucible.load_dataset("org/gsm", split="tset")
    assert gsm.log == []


MISTAKES = {
    "a typo in the repo": (("org/gms",), {}, errors.RepoNotFound, "org/gms: no such repo"),
    "a typo in the config": (("org/gsm", "mian"), {}, errors.ConfigNotFound, "there are: main, socratic"),
    "a typo in the split": (("org/gsm",), {"split": "trian"}, errors.SplitNotFound, "there are: train, test"),
    "a typo in the revision": (("org/gsm",), {"revision": "mian"}, errors.RevisionNotFound, "there are main"),
    "no repo id": (("org gsm",), {}, errors.UsageError, "namespace/name"),
    "a folder that is not there": (("./nowhere",), {}, errors.RepoNotFound, "no such folder"),
    "a folder with a revision": ((".",), {"revision": "v1"}, errors.UsageError, "no revision"),
    "an endpoint that is none": (("org/gsm",), {"endpoint": "hub.local"}, errors.UsageError, "http"),
    "columns as a string": (("org/gsm",), {"columns": "text"}, errors.UsageError, "list of column names"),
    "a column that is not there": (("org/gsm",), {"columns": ["txet"]}, errors.UsageError, "text"),
    "a token that is required": (("org/gsm",), {"token": True}, errors.UsageError, "HF_TOKEN"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_first_mistake_gives_one_clear_line(gsm: FaultyHub, name: str) -> None:
    arguments, keywords, expected, said = MISTAKES[name]
    with pytest.raises(expected) as caught:
        crucible.load_dataset(*arguments, **keywords)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("CRUCIBLE_TRIES", "2")
    monkeypatch.setenv("CRUCIBLE_BACKOFF_CAP", "0.01")
    with pytest.raises(errors.SourceUnavailable, match=r"org/gsm@main from http://127.0.0.1:9: ConnectError") as caught:
        crucible.load_dataset("org/gsm")
    assert "\n" not in str(caught.value)


def test_gated_and_disabled_repos_say_what_to_do(gsm: FaultyHub) -> None:
    from crucible.hub.server import set_access

    gsm.import_files("org/gated", {"train.jsonl": jsonl(3)}, gated="auto")
    with pytest.raises(errors.GatedRepo, match="HF_TOKEN"):
        crucible.load_dataset("org/gated")
    gsm.import_files("org/off", {"train.jsonl": jsonl(3)})
    set_access(gsm.root, "org/off", disabled=True)
    with pytest.raises(errors.DisabledRepo, match="disabled"):
        crucible.load_dataset("org/off")


def test_a_wrong_token_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyHub(tmp_path / "h", options=HubOptions()) as hub:
        hub.import_files("org/gsm", {"train.jsonl": jsonl(3)})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(errors.BadCredentials) as caught:
            crucible.load_dataset("org/gsm")
        assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "do not fit"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"HF_ENDPOINT": "hub"}, "HF_ENDPOINT"),
        ({"CRUCIBLE_SHARD_BYTES": "big"}, "CRUCIBLE_SHARD_BYTES='big'"),
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "soon"}, "HF_HUB_DOWNLOAD_TIMEOUT"),
    ],
)
def test_an_environment_that_makes_no_sense_is_named_by_its_variable(environment: dict[str, str], said: str) -> None:
    with pytest.raises(errors.UsageError) as caught:
        Settings.from_env(environment)
    assert said in str(caught.value)


def test_the_token_is_found_as_the_official_client_finds_it(tmp_path: Path) -> None:
    from huggingface_hub.utils import _auth

    (tmp_path / "token").write_text(" hf_file\r\n")
    home = {"HF_HOME": str(tmp_path)}
    assert Settings.from_env(home).token == "hf_file"
    assert Settings.from_env({**home, "HF_TOKEN": "hf_env\n"}).token == "hf_env"
    assert Settings.from_env({**home, "HUGGING_FACE_HUB_TOKEN": "hf_old"}).token == "hf_old"
    assert Settings.from_env({**home, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}).token is None
    assert Settings.from_env({"HF_HOME": str(tmp_path / "none")}).token is None
    settings = Settings.from_env({"HF_TOKEN": "hf_hidden"})
    assert "hf_hidden" not in repr(settings) + repr(settings.token) + str(replace(settings, offline=True))
    assert _auth._clean_token(" hf_file\r\n") == "hf_file"


@pytest.mark.parametrize(("text", "size"), [("64MB", 64 << 20), ("1.5GiB", 3 << 29), ("4096", 4096), ("2k", 2048)])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "X") == size


@pytest.mark.parametrize(("page_size", "small"), [(1, 0), (3, 0), (1000, 0), (1000, 120)])
def test_the_plan_equals_what_the_run_then_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_size: int, small: int
) -> None:
    """LFS files in parts, small ones (few, and many), a card, several pages: requests, bytes and rows to the last."""
    with FaultyHub(tmp_path / "h", options=HubOptions(page_size=page_size)) as hub:
        files: dict[str, bytes | Path] = {"README.md": b"---\nlicense: mit\n---\n"}
        rows = 0
        for number in range(5):
            count = 700 + 333 * number if number < 4 else 60_000  # the last one comes in parts
            files[f"data/train-{number:05d}-of-{5 + small:05d}.parquet"] = parquet(tmp_path, count, f"p{number}")
            rows += count
        for number in range(5, 5 + small):  # links to these come in batches
            files[f"data/train-{number:05d}-of-{5 + small:05d}.parquet"] = parquet(tmp_path, number, f"s{number}")
            rows += number
        hub.import_files("org/planned", files)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("CRUCIBLE_PART_BYTES", "300000")
        plan = crucible.plan("org/planned", nodes=3, ranks_per_node=2, batch=16)
        assert not (Settings.from_env().home / "shards").exists(), "planning moved data"
        hub.clear_log()
        loaded = crucible.load_dataset("org/planned", split="train", streaming=True)
        assert plan.requests == len(hub.log)
        assert bool(hub.requests("*/info/lfs/objects/batch")) == bool(small)
        assert (plan.rows, plan.rows_from) == (loaded.num_rows, "footers") == (rows, "footers")
        assert plan.source_bytes == sum(node.hub_bytes for node in plan.nodes) == hub.bytes_sent()
        assert [len(loaded.shard(rank, 6)) for rank in range(6)] == [count for count, _ in plan.ranks]
        assert [len(loaded.shard(rank, 6).batch(16)) for rank in range(6)] == [steps for _, steps in plan.ranks]
        again = crucible.plan("org/planned", nodes=3)
        assert (again.cached, again.requests, again.rows_from) == (True, 1, "manifest")


def test_the_plan_says_when_rows_are_not_known_and_takes_the_cards_word(gsm: FaultyHub) -> None:
    assert (crucible.plan("org/gsm").rows, crucible.plan("org/gsm").rows_from) == (None, "unknown")
    card = (
        "---\ndataset_info:\n  features:\n  - name: id\n    dtype: int64\n  - name: text\n    dtype: string\n"
        "  splits:\n  - name: train\n    num_examples: 7\n---\n"
    )
    gsm.import_files("org/declared", {"README.md": card.encode(), "train.jsonl": jsonl(7)})
    declared = crucible.plan("org/declared")
    assert (declared.rows, declared.rows_from) == (7, "card")


def test_columns_make_another_dataset_beside_the_whole_one(gsm: FaultyHub) -> None:
    assert crucible.load_dataset("org/gsm", split="train", columns=["id"])[5] == {"id": 5}
    assert crucible.load_dataset("org/gsm", split="train")[5] == {"id": 5, "text": "m5"}
    assert crucible.load_dataset("org/gsm", split="train", columns=["id"]).column_names == ["id"]


def test_two_processes_that_start_at_once_download_once(gsm: FaultyHub) -> None:
    gsm.add("slow", path="*/resolve/*jsonl", piece=300, wait=0.02)
    script = "import crucible; print(len(crucible.load_dataset('org/gsm', split='train')))"
    processes = [
        subprocess.Popen([sys.executable, "-c", script], env=dict(os.environ), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["70", "70", "70"]
    assert len(gsm.requests("*/resolve/*train.jsonl")) == 1


def test_a_folder_loads_like_a_repo_and_its_changes_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.csv").write_text("a,b\n1,x\n2,y\n")
    assert crucible.plan(str(folder)).requests == 0
    assert list(crucible.load_dataset(str(folder), split="train")) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    (folder / "train.csv").write_text("a,b\n3,z\n")
    assert list(crucible.load_dataset(str(folder), split="train")) == [{"a": 3, "b": "z"}]


def test_lost_shards_are_fetched_again_when_they_are_read(gsm: FaultyHub) -> None:
    dataset = crucible.load_dataset("org/gsm", split="train", streaming=True)
    shutil.rmtree(Settings.from_env().home / "shards")
    assert len(list(dataset)) == 70
    assert dataset.read_counts()["hub_shards"] == 1


def test_a_renamed_repo_and_small_files_behind_a_redirect_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crucible.hub.server import rename_repo

    with FaultyHub(tmp_path / "h", options=HubOptions(resolve_cache_below=1 << 20)) as hub:
        hub.import_files("org/old", {"train.jsonl": jsonl(9)})
        rename_repo(hub.root, "org/old", "org/new")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert len(crucible.load_dataset("org/old", split="train")) == 9
        assert len(crucible.load_dataset("org/new", split="train")) == 9


def test_a_repo_path_that_leaves_its_folder_is_refused(gsm: FaultyHub) -> None:
    from crucible.cluster.resolve import choose, resolve
    from crucible.refs import RepoRef, SourceFile, safe_repo_path

    for path in ("../up.jsonl", "/abs.jsonl", "a/../../b.jsonl", "a\\..\\b", "C:/x", "a//b", "nul\0", "x" * 300, ""):
        with pytest.raises(errors.UnsafePath):
            safe_repo_path("org/x", path)
    repo = RepoRef("org/x", "0" * 40)
    evil = SourceFile("data/../../train.jsonl", 3, "0" * 40, False)
    with pytest.raises((errors.UnsafePath, errors.NoDataFiles)):
        choose(repo, resolve(repo, [evil], None), None, None)


def test_a_script_repo_is_refused_and_its_parquet_copy_is_named(gsm: FaultyHub) -> None:
    from crucible.hub.server import create_branch

    gsm.import_files("org/script", {"script.py": b"raise SystemExit", "train.jsonl": jsonl(3)})
    with pytest.raises(errors.ScriptRepo, match="never runs; no parquet branch"):
        crucible.load_dataset("org/script")
    create_branch(gsm.root, "org/script", "refs/convert/parquet")
    with pytest.raises(errors.ScriptRepo, match="--revision refs/convert/parquet"):
        crucible.load_dataset("org/script")


def test_files_that_disagree_are_unified_or_named_both(gsm: FaultyHub) -> None:
    pad = "x" * 60
    rows = {
        "int": [{"a": i, "t": pad} for i in range(5000)],
        "float": [{"a": i + 0.5, "t": pad} for i in range(5000)],
        "str": [{"a": "s", "t": pad} for _ in range(5000)],
    }

    def put(repo: str, *kinds: str) -> None:
        files = {
            f"train-{number}.jsonl": "".join(json.dumps(row) + "\n" for row in rows[kind]).encode()
            for number, kind in enumerate(kinds)
        }
        gsm.import_files(repo, files)

    put("org/widens", "float", "int")
    widened = crucible.load_dataset("org/widens", split="train")
    assert len(widened.manifest.items) == 2, "one item would show nothing about unification between shards"
    assert (widened[0]["a"], widened[-1]["a"]) == (0.5, 4999.0)
    put("org/conflict", "int", "str")
    with pytest.raises(errors.SchemaConflict, match=r"'a' is string in train-1\.jsonl but int64 in train-0\.jsonl"):
        crucible.load_dataset("org/conflict")


def test_a_split_without_rows_or_even_columns_is_empty_and_no_error(gsm: FaultyHub, tmp_path: Path) -> None:
    gsm.import_files("org/empty", {"train.jsonl": b"", "test.jsonl": jsonl(2)})
    splits = crucible.load_dataset("org/empty")
    assert {name: (len(split), list(split.column_names)) for name, split in splits.items()} == {
        "train": (0, []),
        "test": (2, ["id", "text"]),
    }
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "e.parquet")
    gsm.import_files("org/no-rows", {"train.parquet": tmp_path / "e.parquet"})
    stream = crucible.load_dataset("org/no-rows", split="train", streaming=True)
    assert (stream.num_rows, stream.column_names) == (0, ["a"])
    assert list(stream.shuffle(1).shard(1, 2).batch(4)) == []


def test_the_same_content_under_two_names_is_fetched_once_and_planned_once(gsm: FaultyHub) -> None:
    big = jsonl(30_000)
    gsm.import_files("org/twice", {"train-0.jsonl": big, "train-1.jsonl": big})
    plan = crucible.plan("org/twice")
    gsm.clear_log()
    assert len(crucible.load_dataset("org/twice", split="train")) == 60_000
    assert len(gsm.log) == plan.requests == 3


def test_file_names_with_every_awkward_character_arrive(gsm: FaultyHub) -> None:
    gsm.import_files("org/odd", {"data/train ü #1 50%?.jsonl": jsonl(3), "data/train-b&=+2;'\".jsonl": jsonl(2)})
    assert len(crucible.load_dataset("org/odd", split="train")) == 5
