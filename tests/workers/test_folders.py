# ruff: noqa: E501  # the YAML of a card is a line of its own
"""Folders of images, sounds and videos become the rows of `datasets`, with the files in them."""

from __future__ import annotations

import gc
import io
import warnings
import wave
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible.errors import ConversionError, CorruptFile, UnsafePath
from crucible.workers.convert import schema_of_item
from tests.oracle import datasets
from tests.workers.media_cases import Content, png, zipped
from tests.workers.preparing import features, lay_out, ours, prepared, theirs

P = [png(shade) for shade in range(10)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def card(yaml: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: '**'\n{yaml}---\n"


LABELS = "  features:\n  - {name: image, dtype: image}\n  - name: label\n    dtype:\n      class_label:\n        names: {'0': dog, '1': cat}\n"

CASES: dict[str, dict[str, Content]] = {
    "labels": {"cat/1.png": P[0], "dog/2.png": P[1], "dog/1.JPG": P[2], "a/z.webp": P[3]},
    "files of other kinds": {"a/1.png": P[0], "b/2.png": P[1], "b/notes.txt": "x", "b/3.mp3": "x", "c/x.json": "{}"},
    "folders of two depths": {"cat/1.png": P[0], "dog/x/2.png": P[1]},
    "no folders": {"1.png": P[0], "2.png": P[1]},
    "one folder": {"cat/1.png": P[0], "cat/2.png": P[1]},
    "splits": {"train/cat/1.png": P[0], "train/dog/2.png": P[1], "test/cat/3.png": P[2]},
    "a label that only a later split has": {"train/cat/1.png": P[0], "test/dog/3.png": P[1]},
    "a later split that is deeper": {"train/cat/1.png": P[0], "train/dog/2.png": P[1], "test/x/dog/3.png": P[2]},
    "labels dropped": {"cat/1.png": P[0], "dog/2.png": P[1], "README.md": card("  drop_labels: true\n")},
    "one label kept": {"cat/1.png": P[0], "README.md": card("  drop_labels: false\n")},
    "labels of two depths kept": {"cat/1.png": P[0], "x/dog/1.png": P[1], "README.md": card("  drop_labels: false\n")},
    "declared labels": {"cat/1.png": P[0], "dog/2.png": P[1], "README.md": card(LABELS)},
    "labels of dataset_info are not used": {
        "cat/1.png": P[0],
        "dog/2.png": P[1],
        "README.md": "---\ndataset_info:\n  features:\n  - {name: image, dtype: image}\n  - name: label\n    dtype:\n      class_label:\n        names: {'0': dog, '1': cat}\n---\n",
    },
    "metadata dropped": {
        "cat/1.png": P[0],
        "dog/2.png": P[1],
        "metadata.csv": "file_name,n\ncat/1.png,5\n",
        "README.md": card("  drop_metadata: true\n"),
    },
    "all dropped": {
        "cat/1.png": P[0],
        "metadata.csv": "file_name,n\ncat/1.png,5\n",
        "README.md": card("  drop_metadata: true\n  drop_labels: true\n"),
    },
    "metadata in csv": {
        "1.png": P[0],
        "x/2.png": P[1],
        "unnamed.png": P[2],
        "metadata.csv": "n,file_name,t,u\n1,x/2.png,a,\n2,./1.png,,\n3,,b,\n4,1.png,c,1.5\n",
    },
    "metadata in jsonl": {
        "1.png": P[0],
        "2.png": P[1],
        "metadata.jsonl": '{"file_name":"1.png","o":{"a":[1]},"mask_file_name":"2.png"}\n{"file_name":"2.png","o":null}\n',
    },
    "metadata with lists of files": {
        "1.png": P[0],
        "2.png": P[1],
        "metadata.jsonl": '{"file_names":["1.png","2.png"],"x_file_names":["1.png"]}\n{"file_names":["2.png"],"x_file_names":["2.png","1.png"]}\n',
    },
    "metadata with files deep inside": {
        "1.png": P[0],
        "2.png": P[1],
        "metadata.jsonl": '{"q":{"file_name":"1.png","x_file_name":"2.png","n":1},"l":[{"file_name":"1.png"},{"file_name":"2.png"}]}\n',
    },
    "metadata in parquet": {
        "d/1.png": P[0],
        "d/2.png": P[1],
        "d/metadata.parquet": parquet(
            [{"file_name": f"{n % 2 + 1}.png", "v": [n, None], "s": {"x": n}} for n in range(5)]
        ),
    },
    "metadata of each split": {
        **{f"{split}/{n}.png": P[n] for split in ("train", "test") for n in range(4)},
        "train/metadata.csv": "file_name,n\n3.png,5\n1.png,6\n",
        "test/metadata.csv": "file_name,n\n2.png,7\n",
    },
    "metadata of the second split only": {
        "train/1.png": P[0],
        "test/2.png": P[1],
        "test/metadata.csv": "file_name,n,t\n2.png,5,x\n",
    },
    "metadata of a folder and of one below": {
        "a/1.png": P[0],
        "a/b/2.png": P[1],
        "a/metadata.csv": "file_name,n\nb/2.png,5\n1.png,6\n",
    },
    "declared columns of metadata": {
        "1.png": P[0],
        "metadata.csv": "file_name,n,more\n1.png,007,x\n",
        "README.md": card("  features:\n  - {name: image, dtype: image}\n  - {name: n, dtype: string}\n"),
    },
    "zip without folders": {"a.zip": zipped({"2.png": P[0], "1.png": P[1], "__MACOSX/1.png": "x", ".h.png": "x"})},
    "zip with metadata": {
        "a.zip": zipped({"1.png": P[0], "s/2.png": P[1], "metadata.csv": "file_name,n\ns/2.png,5\n1.png,6\n"})
    },
    "zips of splits": {"train.zip": zipped({"a/1.png": P[0]}), "test.zip": zipped({"a/2.png": P[1]})},
    "files and zips": {"a/1.png": P[0], "b/2.png": P[1], "0.zip": zipped({"c/3.png": P[2]})},
    "videos": {"a/1.mp4": "x", "b/2.mov": "y"},
    "pdfs": {"a/1.pdf": "x", "b/2.PDF": "y", "b/notes.txt": "z"},
    "pdfs with metadata": {"1.pdf": "x", "metadata.jsonl": '{"file_name":"1.pdf","pages":3}\n'},
    "meshes": {"a/1.glb": "x", "b/2.ply": "y", "b/3.stl": "z", "b/4.gltf": "{}"},
    "scans": {"a/1.nii": "x", "a/2.nii": "y"},
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folders_become_the_rows_of_datasets(case: str, tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "repo", CASES[case])
    # `datasets` does not embed these, but says where they are
    expected = theirs(repo, embed=case.split()[0] not in ("videos", "pdfs", "meshes", "scans"))
    for shard_bytes in (1, 1 << 20):
        found = ours(repo, tmp_path / f"home{shard_bytes}", shard_bytes=shard_bytes)
        assert list(found) == list(expected)
        for split, table in expected.items():
            assert features(found[split]) == features(table)
            rows = table.to_pylist()
            for row, made in zip(rows, found[split].to_pylist(), strict=True):
                if "image" in row and row["image"] and row["image"]["path"].endswith(".zip"):
                    row["image"]["path"] = made["image"]["path"]  # theirs is the name of the archive
            for column in {"video", "pdf", "mesh", "nifti"} & set(table.column_names):
                for row in rows:
                    path = Path(row[column]["path"])
                    row[column] = {"bytes": path.read_bytes(), "path": path.name}
            assert found[split].to_pylist() == rows


def tone() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(20))
    return out.getvalue()


def test_sounds_are_carried_as_bytes_and_not_decoded(tmp_path: Path) -> None:
    """`datasets` cannot write them without its audio extra, so there is no oracle here."""
    repo = lay_out(tmp_path / "repo", {"a/1.wav": tone(), "b/2.mp3": b"y"})
    table = ours(repo, tmp_path / "home")["train"]
    assert table.to_pylist() == [
        {"audio": {"bytes": tone(), "path": "1.wav"}, "label": 0},
        {"audio": {"bytes": b"y", "path": "2.mp3"}, "label": 1},
    ]
    described = features(table).to_dict()
    assert described["audio"]["_type"] == "Audio"
    assert described["label"]["names"] == ["a", "b"]


def test_labels_inside_archives_are_the_folders_there(tmp_path: Path) -> None:
    """`datasets` takes the archive's own folder for the label and fails."""
    repo = lay_out(
        tmp_path / "repo",
        {
            "train.zip": zipped({"cat/1.png": P[0], "dog/2.png": P[1], "dog/readme.txt": "x"}),
            "test.zip": zipped({"dog/3.png": P[2]}),
        },
    )
    found = ours(repo, tmp_path / "home")
    assert [row["label"] for row in found["train"].to_pylist()] == [0, 1]
    assert [row["label"] for row in found["test"].to_pylist()] == [1]
    assert found["train"].to_pylist()[1]["image"] == {"bytes": P[1], "path": "2.png"}


def test_a_split_without_metadata_keeps_its_files(tmp_path: Path) -> None:
    """`datasets` gives it no rows when a split before it has metadata, and then fails because it is empty."""
    repo = lay_out(
        tmp_path / "repo",
        {"train/1.png": P[0], "train/metadata.csv": "file_name,n\n1.png,5\n", "test/2.png": P[1]},
    )
    found = ours(repo, tmp_path / "home")
    assert found["test"].to_pylist() == [{"image": {"bytes": P[1], "path": "2.png"}, "n": None}]
    assert found["train"].schema.equals(found["test"].schema, check_metadata=True)


def test_metadata_files_are_read_in_the_order_of_their_paths_and_may_differ(tmp_path: Path) -> None:
    repo = lay_out(
        tmp_path / "repo",
        {
            "b/1.png": P[0],
            "b/metadata.csv": "file_name,n\n1.png,5\n",
            "a/2.png": P[1],
            "a/metadata.jsonl": '{"file_name":"2.png","m":"x"}\n',
        },
    )
    rows = ours(repo, tmp_path / "home")["train"].to_pylist()
    assert [(row["image"]["bytes"] == P[1], row["m"], row["n"]) for row in rows] == [
        (True, "x", None),
        (False, None, 5),
    ]


def many(folder: Path, count: int, note: str) -> Path:
    lines = "".join(f"i/{n:04}.png,{n},{note}\n" for n in reversed(range(count)))
    return lay_out(
        folder, {"metadata.csv": f"file_name,n,t\n{lines}", **{f"i/{n:04}.png": f"{n:04}" * 100 for n in range(count)}}
    )


def test_many_rows_are_many_items_that_bring_their_files_once(tmp_path: Path) -> None:
    repo = many(tmp_path / "repo", 700, "")
    ready = prepared(repo, tmp_path / "home")
    (items,) = ready.items
    assert len(items) == 3
    metadata = items[0].files[0]
    named = [file.path for item in items for file in item.files[1:]]
    assert all(item.files[0] == metadata for item in items)
    assert len(named) == len(set(named)) == 700
    assert len({item.key for item in items}) == 3
    rows = ours(repo, tmp_path / "again")["train"].to_pylist()
    assert [row["n"] for row in rows] == list(reversed(range(700)))
    assert all(row["image"]["bytes"] == f"{row['n']:04}".encode() * 100 for row in rows)


def test_the_settings_of_a_call_count_like_those_of_the_card(tmp_path: Path) -> None:
    repo = lay_out(
        tmp_path / "repo",
        {"cat/1.png": P[0], "dog/2.png": P[1], "notes.csv": "file_name,n\ncat/1.png,5\n"},
    )
    assert crucible.load_dataset(str(repo), split="train").column_names == ["image", "label"]
    assert crucible.load_dataset(str(repo), split="train", drop_labels=True).column_names == ["image"]
    for name in (str(repo), "imagefolder"):
        call: dict[str, Any] = {"split": "train", "metadata_filenames": ["notes.csv"]}
        call["data_files"] = "**" if name == str(repo) else str(repo / "**")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            theirs = datasets.load_dataset(name, cache_dir=str(tmp_path / Path(name).name), **call)
            gc.collect()
        ours = crucible.load_dataset(name, **call)
        assert ours.column_names == theirs.column_names == ["image", "n"]
        assert list(ours["n"]) == list(theirs["n"]) == [5]


def test_a_big_metadata_file_is_not_brought_for_every_few_images(tmp_path: Path) -> None:
    (items,) = prepared(many(tmp_path / "repo", 700, "x" * 500), tmp_path / "home").items
    metadata = items[0].files[0].size
    assert metadata * len(items) <= sum(file.size for item in items for file in item.files[1:]) / 7 + metadata


def test_the_names_of_files_are_part_of_the_keys(tmp_path: Path) -> None:
    one = prepared(lay_out(tmp_path / "a", {"x/1.png": P[0], "y/2.png": P[1]}), tmp_path / "h1").items[0]
    two = prepared(lay_out(tmp_path / "b", {"x/1.png": P[0], "y/3.png": P[1]}), tmp_path / "h2").items[0]
    same = prepared(lay_out(tmp_path / "c", {"x/1.png": P[0], "y/2.png": P[1]}), tmp_path / "h3").items[0]
    assert one[0].key == same[0].key != two[0].key


def test_only_the_chosen_columns_are_converted(tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "a", {"1.png": P[0], "metadata.csv": "file_name,n,m\n1.png,5,6\n"})
    assert ours(repo, tmp_path / "h1", columns=("m", "image"))["train"].column_names == ["m", "image"]
    repo = lay_out(tmp_path / "b", {"train/cat/1.png": P[0], "test/dog/2.png": P[1]})
    assert ours(repo, tmp_path / "h2", columns=("label",))["train"].to_pylist() == [{"label": None}]


def test_a_metadata_file_without_rows_has_columns(tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "a", {"1.png": P[0], "metadata.csv": "file_name,n\n"})
    (item,) = prepared(repo, tmp_path / "home").items[0]
    schema = schema_of_item(item, [repo / file.path for file in item.files], tmp_path)
    assert schema is not None
    assert "n" in schema.names


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"metadata.csv": "file_name,n\nzz.png,5\n"},
            r"metadata.csv at row 0: names 'zz.png', which is not in the repo",
        ),
        ({"metadata.csv": "file_name,n\n1.png,1\n../1.png,5\n"}, "row 1.*not a path inside"),
        ({"metadata.csv": "file_name,n\n/etc/passwd,5\n"}, "not a path inside"),
        ({"metadata.csv": "file_name,n\nfile:///etc/passwd,5\n"}, "not a path inside"),
        ({"metadata.csv": "file_name,n\nx/../../1.png,5\n"}, "not a path inside"),
        ({"metadata.csv": "name,n\n1.png,5\n"}, "its columns"),
        ({"metadata.csv": "file_name,image\n1.png,5\n"}, "two columns 'image'"),
        ({"metadata.jsonl": '{"file_name": "1.png"\n'}, "metadata.jsonl"),
        ({"metadata.parquet": "PAR1"}, "metadata.parquet"),
        ({"a.zip": zipped({"1.png": P[0], "metadata.csv": "file_name,n\n2.png,5\n"})}, "'2.png'.*not in the archive"),
        ({"a.zip": zipped({"1.png": P[0]})[:-30]}, "a.zip"),
        ({"a.zip": zipped({"1.png": b"x" * 100}, 0).replace(b"xxxx", b"yyyy", 1)}, "a.zip at '1.png'"),
    ],
)
def test_what_cannot_be_rows_is_named(files: dict[str, Content], problem: str, tmp_path: Path) -> None:
    repo = lay_out(tmp_path / "repo", {"1.png": P[0], **files})
    with pytest.raises(CorruptFile, match=problem):
        ours(repo, tmp_path / "home")


def test_an_archive_with_a_way_out_is_refused(tmp_path: Path) -> None:
    for name in ("../x.png", "/x.png", "a/../../x.png"):
        repo = lay_out(tmp_path / "repo", {"a.zip": zipped({name: P[0]})})
        with pytest.raises(UnsafePath):
            ours(repo, tmp_path / "home")


def test_files_too_big_for_a_row_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = lay_out(tmp_path / "repo", {"a/1.png": b"x" * 5000, "b/2.png": P[0]})
    monkeypatch.setenv("CRUCIBLE_ROW_BYTES", "4096")
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    with pytest.raises(ConversionError, match="CRUCIBLE_ROW_BYTES"):
        crucible.load_dataset(str(repo), split="train")
