"""Where features come from, and which win: the argument's, the card's, the config's or the file's, as in `datasets`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import crucible
from crucible.errors import CorruptFile, SchemaConflict
from crucible.features import ClassLabel, Features, Image, Value
from tests.oracle import datasets

LABEL = ClassLabel(names=["x", "y"])
INFO = """dataset_info:
  features:
  - name: a
    dtype: float32
  - name: l
    dtype:
      class_label:
        names:
          '0': x
          '1': y
"""
CONFIG = """configs:
- config_name: default
  data_files: '{file}'
  features:
  - name: a
    dtype: int8
  - name: l
    dtype: string
"""
ROWS = pa.table({"a": [1, 2], "l": ["x", "y"]})
NAMED = ROWS.replace_schema_metadata(
    datasets.Features({"a": datasets.ClassLabel(num_classes=3), "l": datasets.Value("string")}).arrow_schema.metadata
)
FILES: dict[str, Any] = {
    "train.csv": "a,l\n1,x\n2,y\n",
    "train.jsonl": '{"a":1,"l":"x"}\n{"a":2,"l":"y"}\n',
    "train.parquet": NAMED,
}
CARDS = {"no card": "", "info": INFO, "config": CONFIG, "both": CONFIG + INFO}
ARGUMENTS: dict[str, Any] = {
    "no argument": None,
    "all columns": {"a": Value("float64"), "l": LABEL},
    "another order": {"l": Value("large_string"), "a": Value("int16")},
    "one more": {"a": Value("int64"), "l": LABEL, "z": Value("string")},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def repo(folder: Path, files: dict[str, Any], card: str = "") -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, folder / name)
        else:
            (folder / name).write_text(content)
    if card:
        (folder / "README.md").write_text(f"---\n{card.format(file=next(iter(files)))}---\n")
    return str(folder)


def plain(features: Any) -> Any:
    return json.loads(json.dumps(features.to_dict()))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("argument", ARGUMENTS.values(), ids=ARGUMENTS)
def test_the_same_features_win(tmp_path: Path, home: Path, file: str, card: str, argument: Any) -> None:
    path = repo(tmp_path / "repo", {file: FILES[file]}, card)
    told = None if argument is None else datasets.Features.from_dict(Features(argument).to_dict())
    theirs = datasets.load_dataset(path, split="train", features=told)
    mine = crucible.load_dataset(path, split="train", features=argument)
    assert isinstance(mine, crucible.Dataset)
    assert mine.features == plain(theirs.features)
    assert list(mine.features) == list(theirs.features)
    assert list(mine) == list(theirs)
    shards = [str(shard) for shard in home.glob("shards/*/*.arrow")]
    again = datasets.load_dataset("arrow", data_files=shards, split="train")
    assert again.features == theirs.features
    assert list(again) == list(theirs)


def test_the_argument_may_be_an_object_of_datasets(tmp_path: Path) -> None:
    path = repo(tmp_path / "repo", {"train.csv": FILES["train.csv"]})
    told = datasets.Features({"a": datasets.Value("int8"), "l": datasets.ClassLabel(names=["x", "y"])})
    mine = crucible.load_dataset(path, split="train", features=told)
    assert isinstance(mine, crucible.Dataset)
    assert mine.features == plain(told)
    assert mine.features["l"].int2str(list(mine["l"])) == ["x", "y"]


def test_values_that_do_not_fit_the_argument_name_the_file_and_the_row(tmp_path: Path) -> None:
    path = repo(tmp_path / "repo", {"train.csv": "a\n1\n2\n900\n"})
    with pytest.raises(SchemaConflict, match=r"'a' is .*row 2 of the batch, '900'.*train\.csv but int8"):
        crucible.load_dataset(path, split="train", features={"a": Value("int8")})


def test_a_broken_image_names_the_file_it_came_from(tmp_path: Path) -> None:
    whole = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(whole, "png")
    contents = [whole.getvalue(), b"broken"]
    tables = {
        f"data/train-0000{number}-of-00002.parquet": pa.table(
            {"image": [{"bytes": one, "path": None} for one in contents], "n": [number, number]}
        )
        for number in range(2)
    }
    path = repo(tmp_path / "repo", tables)
    features = {"image": Image(), "n": Value("int64")}
    ds = crucible.load_dataset(path, split="train", features=features)
    assert isinstance(ds, crucible.Dataset)
    with pytest.raises(CorruptFile, match=r"data/train-0000.*row 3 \(shard [0-9a-f]{12}, row \d\), column 'image'"):
        ds[3]
    assert [row["n"] for row in ds.decode(on_error="skip")] == [0, 1]
    tail = crucible.load_dataset(path, split="train[3:]", features=features)
    assert isinstance(tail, crucible.Dataset)
    with pytest.raises(CorruptFile, match=r"row 0 \(shard [0-9a-f]{12}, row [13]\)"):
        tail[0]
