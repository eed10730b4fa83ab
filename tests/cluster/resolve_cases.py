# ruff: noqa: E501  # a case is one line of YAML, however long
"""Repo layouts for the differential test of resolution: name -> files (path -> text) and the text of the card."""

from __future__ import annotations

import gzip
from pathlib import Path

CSV = "a,b\n1,x\n2,y\n"
JSONL = '{"a": 1, "b": "x"}\n{"a": 2, "b": "y"}\n'
TXT = "one\ntwo\n"


def card(yaml: str) -> str:
    return f"---\n{yaml.strip()}\n---\n# A data set\n"


def content(path: str, text: str) -> bytes:
    """What a file of a layout holds: its own path in the first row, so that the order of files shows in the rows."""
    if text in (CSV, JSONL):
        text = text.replace("x", path, 1)
    data = (path + "\n" + text if text == TXT else text).encode()
    return gzip.compress(data, mtime=0) if path.endswith(".gz") else data


def lay_out(folder: Path, files: dict[str, str], text: str | None) -> list[str]:
    """Write a repo to disk; the paths of its files."""
    paths = [*files, *(["README.md"] if text is not None else [])]
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content(path, files[path]) if path in files else (text or "").encode())
    folder.mkdir(exist_ok=True)
    return paths


def csvs(*paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, CSV)


CONVENTIONS: dict[str, dict[str, str]] = {
    "one file at the top": csvs("data.csv"),
    "train and test at the top": csvs("train.csv", "test.csv"),
    "all keywords of file names": csvs("training.csv", "dev.csv", "eval.csv"),
    "several validation words": csvs("train.csv", "valid.csv", "val.csv", "validation.csv"),
    "a split folder hides file names": csvs("train/a.csv", "test.csv"),
    "split folders": csvs("train/1.csv", "train/0.csv", "test/0.csv", "validation/x.csv"),
    "split folders with separators": csvs("my-train/0.csv", "my_test-1/0.csv"),
    "a folder that matches twice": csvs("train/train_2/0.csv", "train/b.csv"),
    "keywords inside longer words": csvs("trainer.csv", "latest.csv"),
    "one name for two splits": csvs("train-test.csv"),
    "sharded names": {f"data/{n}-0000{i}-of-00002.csv": CSV for n in ("train", "test", "extra", "Zoo") for i in (1, 0)},
    "sharded names with something behind": csvs("data/train-00000-of-00001-abcdef.csv", "data/other.csv"),
    "sharded names elsewhere": csvs("more/train-00000-of-00001.csv"),
    "sharded names of odd splits": csvs("data/a.b-00000-of-00001.csv", "data/c-00000-of-00001.csv"),
    "a sharded split that is no word": csvs("data/a-b-00000-of-00001.csv"),
    "digits as separators": csvs("train0.csv", "train10.csv", "train2.csv", "test1.csv"),
    "upper case is no keyword": csvs("TRAIN.csv", "Test.csv"),
    "deep folders": csvs("a/b/c/train.csv", "a/b/test.csv"),
    "ignored names": {**csvs("a.csv", "config.json", "dataset_info.json", "dataset_dict.json"), "dummy_data.zip": "x"},
    "hidden and special folders": csvs("a.csv", ".hidden.csv", ".h/b.csv", "__pycache__/c.csv", "x__y/d.csv"),
    "a double underscore file": csvs("__a.csv", "b.csv"),
    "the most common extension": {**csvs("1.csv", "2.csv"), "3.jsonl": JSONL, "4.txt": TXT},
    "a tie goes to jsonl": {**csvs("1.csv"), "2.jsonl": JSONL},
    "a tie of json and jsonl": {"1.json": JSONL, "2.jsonl": JSONL},
    "a tie goes to the last of the alphabet": {"1.txt": TXT, "2.xml": "<a/>"},
    "tab separated": {"a.tsv": "a\tb\n1\tx\n"},
    "ndjson": {"a.ndjson": JSONL},
    "two dots in a name": csvs("v1.2.csv", "v1.3.csv"),
    "an unknown extension beside": {**csvs("a.csv"), "b.weird": "?", "LICENSE": "free"},
    "only unknown extensions": {"a.weird": "?", "LICENSE": "free"},
    "upper case extensions": {"A.CSV": CSV},
    "text files": {"train.txt": TXT, "test.txt": TXT},
    "splits of two formats": {**csvs("train.csv"), "test.jsonl": JSONL},
    "names with spaces and brackets": csvs("my train set.csv", "test [1].csv"),
    "a compressed suffix": csvs("train.csv.gz", "test.csv.gz"),
    "a suffix in the middle": csvs("train.csv.old", "x.csv"),
    "code beside the data": {**csvs("a.csv"), "load.py": "1", "nb.ipynb": "{}"},
    "a toml file beside the data": {**csvs("a.csv"), "pyproject.toml": ""},
    "a markdown file beside the data": {**csvs("a.csv"), "NOTES.md": "hi"},
    "an extension in a folder's name": {
        **csvs("a.csv", "b.csv", "x.csv.d/c.csv"),
        "x.csv.d/e.txt": CSV,
        "y.csv/f.txt": TXT,
    },
    "nothing but a card": {},
    "eval logs": {"a.eval": "x", "train.csv": CSV},
    "task folders": {"t/task.toml": "x", "t/instruction.md": "y", "train.csv": CSV},
}

CARDS: dict[str, tuple[dict[str, str], str]] = {
    "one pattern": (csvs("x/a.csv", "x/b.csv", "c.csv"), "configs:\n- config_name: main\n  data_files: x/*.csv"),
    "a list of patterns": (
        csvs("a.csv", "b.csv", "c.csv"),
        "configs:\n- config_name: main\n  data_files: [c.csv, 'a*', '[b]*.csv']",
    ),
    "overlapping patterns": (csvs("a.csv", "b.csv"), "configs:\n- config_name: m\n  data_files: ['*.csv', a.csv]"),
    "splits": (
        csvs("a.csv", "b.csv", "sub/c.csv"),
        "configs:\n- config_name: m\n  data_files:\n  - split: zeta\n    path: a.csv\n  - split: alpha\n    path: [b.csv, 'sub/*']",
    ),
    "two configs without a default": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv",
    ),
    "a marked default": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n  default: true",
    ),
    "a config named default": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: a\n  data_files: a.csv\n- config_name: default\n  data_files: b.csv",
    ),
    "two defaults": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: a\n  data_files: a.csv\n  default: true\n- config_name: default\n  data_files: b.csv",
    ),
    "data_dir alone": (
        csvs("en/train.csv", "en/test.csv", "fr/train.csv"),
        "configs:\n- config_name: en\n  data_dir: en\n- config_name: fr\n  data_dir: fr",
    ),
    "data_dir and data_files": (
        csvs("en/x.csv", "en/y.csv", "fr/x.csv", "x.csv"),
        "configs:\n- config_name: en\n  data_dir: en\n  data_files: x.csv",
    ),
    "data_dir with a slash at the end": (csvs("en/train.csv"), "configs:\n- config_name: en\n  data_dir: en/"),
    "data_dir that starts with a dot": (csvs("en/train.csv"), "configs:\n- config_name: en\n  data_dir: ./en"),
    "data_dir that is not there": (csvs("en/train.csv"), "configs:\n- config_name: en\n  data_dir: nope"),
    "neither files nor folder": (csvs("train.csv", "test.csv"), "configs:\n- config_name: m"),
    "double star": (csvs("a/b/c.csv", "a/d.csv", "e.csv"), "configs:\n- config_name: m\n  data_files: '**/*.csv'"),
    "double star at the end": (csvs("a/b/c.csv", "a/d.csv", "e.csv"), "configs:\n- config_name: m\n  data_files: a/**"),
    "double star inside a name": (csvs("a/b.csv"), "configs:\n- config_name: m\n  data_files: 'a**.csv'"),
    "a question mark and a class": (
        csvs("a1.csv", "a2.csv", "b1.csv", "a-.csv"),
        "configs:\n- config_name: m\n  data_files: ['a?.csv', '[!a]1.csv', 'a[0-1].csv', 'a[-]*']",
    ),
    "a hidden folder that is named": (
        csvs(".h/a.csv", ".h/.b.csv", "c.csv"),
        "configs:\n- config_name: m\n  data_files: .h/*.csv",
    ),
    "a special folder that is named": (
        csvs("__s__/a.csv", "c.csv"),
        "configs:\n- config_name: m\n  data_files: __s__/*",
    ),
    "a literal path that is missing": (csvs("a.csv"), "configs:\n- config_name: m\n  data_files: [a.csv, nope.csv]"),
    "a pattern without a match": (csvs("a.csv"), "configs:\n- config_name: m\n  data_files: [a.csv, 'nope*.csv']"),
    "a split without a match": (
        csvs("a.csv"),
        "configs:\n- config_name: m\n  data_files:\n  - split: train\n    path: a.csv\n  - split: test\n    path: nope*.csv",
    ),
    "a path that is a folder": (csvs("x/a.csv"), "configs:\n- config_name: m\n  data_files: x"),
    "a path with a dot": (csvs("x/a.csv"), "configs:\n- config_name: m\n  data_files: ./x/a.csv"),
    "an ignored name that is named": (
        {"config.json": JSONL, "a.json": JSONL},
        "configs:\n- config_name: m\n  data_files: config.json",
    ),
    "a duplicate split": (
        csvs("a.csv"),
        "configs:\n- config_name: m\n  data_files:\n  - split: train\n    path: a.csv\n  - split: train\n    path: a.csv",
    ),
    "a bad split name": (csvs("a.csv"), "configs:\n- config_name: m\n  data_files:\n  - split: a-b\n    path: a.csv"),
    "a dotted split name": (
        csvs("a.csv"),
        "configs:\n- config_name: m\n  data_files:\n  - split: a.b\n    path: a.csv",
    ),
    "another format in a pattern": (
        {**csvs("d/a.csv", "d/b.csv"), "d/c.txt": CSV, "d/e.weird": "?"},
        "configs:\n- config_name: m\n  data_files: d/*",
    ),
    "configs of two formats": (
        {**csvs("a.csv"), "b.jsonl": JSONL},
        "configs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.jsonl",
    ),
    "a separator": ({"a.csv": "a;b\n1;x\n"}, "configs:\n- config_name: m\n  data_files: a.csv\n  sep: ';'"),
    "an unknown setting": (csvs("a.csv"), "configs:\n- config_name: m\n  data_files: a.csv\n  colour: red"),
    "a config name twice": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: m\n  data_files: a.csv\n- config_name: m\n  data_files: b.csv",
    ),
    "a config name twice, first with a split twice": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: m\n  data_files:\n  - split: train\n    path: a.csv\n  - split: train\n    path: b.csv\n- config_name: m\n  data_files: b.csv",
    ),
    "configs that are no list": (csvs("a.csv"), "configs: {a: 1}"),
    "a config without a name": (csvs("a.csv"), "configs:\n- data_files: a.csv"),
    "a config name with a slash": (csvs("a.csv"), "configs:\n- config_name: a/b\n  data_files: a.csv"),
    "data_files that are a number": (csvs("a.csv"), "configs:\n- config_name: m\n  data_files: 5"),
    "data_files with another key": (
        csvs("a.csv"),
        "configs:\n- config_name: m\n  data_files:\n  - split: train\n    pattern: a.csv",
    ),
    "an empty list of configs": (csvs("a.csv"), "configs: []"),
    "a card about something else": (csvs("train.csv"), "license: mit\nlanguage: [en]"),
    "features of a config": (
        csvs("a.csv"),
        "configs:\n- config_name: m\n  data_files: a.csv\n  features:\n  - name: a\n    dtype: int32\n  - name: b\n    dtype: string",
    ),
    "features of dataset_info": (
        {"a.jsonl": JSONL},
        "dataset_info:\n  features:\n  - name: a\n    dtype: float32\n  - name: b\n    dtype: string\n  splits:\n  - name: train\n    num_examples: 2",
    ),
    "features of both": (
        {"a.jsonl": JSONL},
        "dataset_info:\n- config_name: m\n  features:\n  - name: a\n    dtype: float32\n  - name: b\n    dtype: string\n"
        "configs:\n- config_name: m\n  data_files: a.jsonl\n  features:\n  - name: a\n    dtype: int16\n  - name: b\n    dtype: string",
    ),
    "a dataset_info without features beside a config with": (
        {"a.jsonl": JSONL},
        "dataset_info:\n- config_name: m\n  splits:\n  - name: train\n    num_examples: 2\n"
        "configs:\n- config_name: m\n  data_files: a.jsonl\n  features:\n  - name: a\n    dtype: int16\n  - name: b\n    dtype: string",
    ),
    "a lone dataset_info of another name": (
        csvs("a.csv"),
        "dataset_info:\n  config_name: other\n  splits:\n  - name: train\n    num_examples: 2",
    ),
    "a lone dataset_info picks among configs": (
        csvs("a.csv", "b.csv"),
        "dataset_info:\n  config_name: b\n  splits:\n  - name: train\n    num_examples: 2\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv",
    ),
    "two dataset_infos": (
        csvs("a.csv"),
        "dataset_info:\n- config_name: x\n  splits: []\n- config_name: y\n  splits: []",
    ),
    "class label ids with a hole": (
        csvs("a.csv"),
        "dataset_info:\n  features:\n  - name: a\n    dtype:\n      class_label:\n        names:\n          '0': x\n          '2': y",
    ),
    "class labels": (
        {"a.jsonl": '{"a": 1}\n'},
        "dataset_info:\n  features:\n  - name: a\n    dtype:\n      class_label:\n        names:\n          '0': x\n          '1': y",
    ),
    "YAML that is broken": (csvs("a.csv"), "configs: [\n- x"),
    "YAML that is a list": (csvs("a.csv"), "- a\n- b"),
}

LEGACY: dict[str, tuple[dict[str, str], str | None]] = {
    name: ({"a.jsonl": JSONL, "dataset_infos.json": infos}, card_text)
    for name, (infos, card_text) in {
        "one info of any name": (
            '{"user--name": {"features": {"a": {"dtype": "float32", "id": null, "_type": "Value"}, "b": {"dtype": "string", "id": null, "_type": "Value"}},'
            ' "splits": {"train": {"name": "train", "num_bytes": 1, "num_examples": 2, "dataset_name": "x"}}}}',
            None,
        ),
        "the card overrides": (
            '{"x": {"features": {"a": {"dtype": "float32", "_type": "Value"}}}}',
            "dataset_info:\n  features:\n  - {name: a, dtype: int8}\n  - {name: b, dtype: string}",
        ),
        "two infos": (
            '{"x": {"features": null}, "default": {"features": {"a": {"dtype": "int16", "_type": "Value"}, "b": {"dtype": "string", "_type": "Value"}}}}',
            None,
        ),
    }.items()
}
