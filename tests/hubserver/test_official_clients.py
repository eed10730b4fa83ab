"""The official clients, unmodified, against the local Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crucible.hub.server import HubOptions, User, create_branch, create_pr, create_tag, rename_repo
from tests.hubserver.faults import FaultyHub
from tests.hubserver.official import run_client

CARD = b"""---
license: mit
configs:
- config_name: default
  data_files: data/train-*.parquet
---
# rows
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "client"
    made.mkdir()
    return made


def parquet(start: int, stop: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": list(range(start, stop)), "text": [f"row {n}" for n in range(start, stop)]}), sink)
    return bytes(sink.getvalue())


def rows(hub: FaultyHub) -> str:
    return hub.import_files(
        "org/rows",
        {
            "README.md": CARD,
            "data/train-00000-of-00002.parquet": parquet(0, 50),
            "data/train-00001-of-00002.parquet": parquet(50, 100),
            "data/test.jsonl": b'{"n": 1000, "text": "a"}\n{"n": 1001, "text": "b"}\n',
        },
    )


def test_huggingface_hub_downloads_lists_and_searches(tmp_path: Path, home: Path) -> None:
    options = HubOptions(tokens={"hf_anna": User("anna", ("org",))}, page_size=2, expand_page_size=2)
    with FaultyHub(tmp_path / "hub", options=options) as hub:
        sha = rows(hub)
        create_tag(hub.root, "org/rows", "v1")
        create_branch(hub.root, "org/rows", "refs/convert/parquet")
        create_pr(hub.root, "org/rows", 3)
        hub.import_files("org/net", {"config.json": b"{}", "w.safetensors": b"w" * 3000}, repo_type="model")
        hub.import_files("org/old", {"a.txt": b"renamed"}, repo_type="model")
        rename_repo(hub.root, "org/old", "org/new", repo_type="model")
        hub.import_files("lab/gated", {"a.txt": b"a"}, gated=True)
        hub.import_files("org/private", {"a.txt": b"mine"}, private=True)
        run_client(
            hub,
            home,
            f"""
            import pathlib
            from huggingface_hub import HfApi, HfFileSystem, auth_check, hf_hub_download, snapshot_download
            from huggingface_hub.errors import (
                EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)

            def refused(error, call, *args, **options):
                try:
                    call(*args, **options)
                except error as caught:
                    assert type(caught) is error or error is EntryNotFoundError, repr(caught)
                else:
                    raise AssertionError(f"{{call}} was allowed")

            sha = {sha!r}
            # files
            path = hf_hub_download("org/rows", "data/test.jsonl", repo_type="dataset", revision="v1")
            assert pathlib.Path(path).read_bytes().startswith(b'{{"n": 1000') and sha in path
            assert pathlib.Path(hf_hub_download("org/net", "w.safetensors")).read_bytes() == b"w" * 3000
            assert pathlib.Path(hf_hub_download("org/old", "a.txt")).read_text() == "renamed"
            folder = pathlib.Path(snapshot_download("org/rows", repo_type="dataset", revision="refs/pr/3"))
            assert len([file for file in folder.rglob("*") if file.is_file()]) == 4
            # errors
            refused(EntryNotFoundError, hf_hub_download, "org/net", "nothing")
            refused(RevisionNotFoundError, hf_hub_download, "org/net", "config.json", revision="nope")
            refused(RepositoryNotFoundError, hf_hub_download, "org/nothing", "config.json")
            refused(RepositoryNotFoundError, hf_hub_download, "org/private", "a.txt", repo_type="dataset")
            refused(GatedRepoError, hf_hub_download, "lab/gated", "a.txt", repo_type="dataset")
            refused(GatedRepoError, auth_check, "lab/gated", repo_type="dataset", token="hf_anna")
            mine = hf_hub_download("org/private", "a.txt", repo_type="dataset", token="hf_anna")
            assert pathlib.Path(mine).read_text() == "mine"
            # API
            api = HfApi()
            assert api.whoami(token="hf_anna")["name"] == "anna"
            info = api.dataset_info("org/rows", files_metadata=True)
            assert info.sha == sha and info.card_data.license == "mit" and len(info.siblings) == 4
            assert any(file.lfs for file in info.siblings)
            assert api.dataset_info("org/rows", expand=["likes"]).likes == 0
            assert api.model_info("org/net").siblings[0].rfilename == "config.json"
            assert sorted(api.list_repo_files("org/rows", repo_type="dataset"))[0] == "README.md"
            tree = list(api.list_repo_tree("org/rows", repo_type="dataset", recursive=True, expand=True))
            assert len(tree) == 5 and all(entry.last_commit.oid == sha for entry in tree)
            found = api.get_paths_info("org/rows", ["data", "no"], repo_type="dataset")
            assert [entry.path for entry in found] == ["data"]
            refs = api.list_repo_refs("org/rows", repo_type="dataset", include_pull_requests=True)
            assert [ref.name for ref in refs.branches + refs.converts + refs.tags] == ["main", "parquet", "v1"]
            assert refs.pull_requests[0].ref == "refs/pr/3"
            assert [commit.commit_id for commit in api.list_repo_commits("org/rows", repo_type="dataset")] == [sha]
            assert [repo.id for repo in api.list_datasets(filter="license:mit")] == ["org/rows"]
            assert [repo.id for repo in api.list_datasets(author="lab")] == ["lab/gated"]
            assert sorted(repo.id for repo in api.list_models(search="org")) == ["org/net", "org/new"]
            assert len(list(api.list_datasets(limit=1))) == 1
            assert api.file_exists("org/net", "config.json") and not api.file_exists("org/net", "no")
            assert api.revision_exists("org/rows", "v1", repo_type="dataset")
            # file system
            fs = HfFileSystem()
            assert len(fs.glob("datasets/org/rows/**/*.parquet")) == 2
            assert len(fs.ls("datasets/org/rows@refs%2Fpr%2F3/data", detail=False)) == 3
            with fs.open("org/net/w.safetensors", block_size=100) as stream:
                stream.seek(2990)
                assert stream.read() == b"w" * 10
            """,
        )
        ranged = [record for record in hub.requests(origin="cdn", path="*w.safetensors") if record.range]
        assert ranged, "HfFileSystem asks the blob's origin for ranges"
        assert not any(record.had_token for record in hub.requests(origin="cdn"))


def test_datasets_loads_and_streams(tmp_path: Path, home: Path) -> None:
    with FaultyHub(tmp_path / "hub", options=HubOptions(page_size=2)) as hub:
        rows(hub)
        hub.import_files("org/lines", {"train.jsonl": b'{"n": 1000, "text": "a"}\n{"n": 1001, "text": "b"}\n'})
        run_client(
            hub,
            home,
            """
            from datasets import load_dataset
            loaded = load_dataset("org/rows", "default")
            assert {split: len(loaded[split]) for split in loaded} == {"train": 100}
            assert loaded["train"][99] == {"n": 99, "text": "row 99"}
            stream = load_dataset("org/rows", "default", split="train", streaming=True)
            assert [row["n"] for row in stream] == list(range(100))
            lines = load_dataset("org/lines", split="train", streaming=True)
            assert [row["n"] for row in lines] == [1000, 1001]
            """,
        )
        assert hub.requests("/blobs/*", origin="cdn")


def test_the_official_client_survives_small_files_by_relative_redirect(tmp_path: Path, home: Path) -> None:
    with FaultyHub(tmp_path / "hub", options=HubOptions(resolve_cache_below=10_000)) as hub:
        rows(hub)
        run_client(
            hub,
            home,
            """
            from huggingface_hub import hf_hub_download
            with open(hf_hub_download("org/rows", "README.md", repo_type="dataset")) as stream:
                assert "license: mit" in stream.read()
            """,
        )
        assert hub.requests("/api/resolve-cache/*")


def test_the_official_client_waits_out_a_429_while_it_lists(tmp_path: Path, home: Path) -> None:
    with FaultyHub(tmp_path / "hub", options=HubOptions(page_size=2)) as hub:
        rows(hub)
        fault = hub.add("429", path="*/tree/*", wait=1.0)
        run_client(
            hub,
            home,
            """
            from huggingface_hub import HfApi
            assert len(list(HfApi().list_repo_tree("org/rows", repo_type="dataset", recursive=True))) == 5
            """,
        )
        assert hub.hits(fault) == 1


@pytest.mark.real_data
def test_a_real_data_set_loads_through_the_local_hub(
    hub: FaultyHub, home: Path, real_data: Callable[[str], Path]
) -> None:
    hub.import_folder("openai/gsm8k", real_data("gsm8k"))
    run_client(
        hub,
        home,
        """
        from datasets import load_dataset
        loaded = load_dataset("openai/gsm8k")
        assert {split: len(loaded[split]) for split in loaded} == {"train": 7473, "test": 1319}
        """,
    )
