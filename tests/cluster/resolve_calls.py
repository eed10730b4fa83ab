# ruff: noqa: E501  # a case is one line of YAML, however long
"""More repo layouts for the tests of resolution: what a caller's arguments choose, `.huggingface.yaml`, order of rows."""

from __future__ import annotations

from typing import Any

from tests.cluster.resolve_cases import CSV, JSONL, TXT, csvs
from tests.oracle import datasets

NARROW = datasets.Features({"a": datasets.Value("int8"), "b": datasets.Value("large_string")})
TWO = "configs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n  sep: ';'"
SEMICOLONS = {"a.csv": "a,b\n1,x\n", "b.csv": "a;b\n2,5;y\n", "c.csv": "a;b\n3;z\n"}

CALLS: dict[str, tuple[dict[str, str], str | None, dict[str, Any]]] = {
    "a pattern": (csvs("x/a.csv", "x/b.csv", "c.csv"), None, {"data_files": "x/*.csv"}),
    "a list": (csvs("a.csv", "b.csv", "c.csv"), None, {"data_files": ["c.csv", "a.csv"]}),
    "a tuple": (csvs("a.csv", "b.csv", "c.csv"), None, {"data_files": ("c.csv", "b*")}),
    "splits": (csvs("a.csv", "b.csv", "c.csv"), None, {"data_files": {"zeta": "a.csv", "test": ["c.csv", "b.csv"]}}),
    "a list of splits": (
        csvs("a.csv", "b.csv"),
        None,
        {"data_files": [{"split": "dev", "path": "b.csv"}, {"split": "train", "path": ["a.csv"]}]},
    ),
    "a duplicate split of a list": (
        csvs("a.csv", "b.csv"),
        None,
        {"data_files": [{"split": "dev", "path": "b.csv"}, {"split": "dev", "path": ["a.csv"]}]},
    ),
    "a list of splits and others": (csvs("a.csv"), None, {"data_files": [{"split": "dev", "path": "a.csv"}, "a.csv"]}),
    "nothing": (csvs("a.csv"), None, {"data_files": []}),
    "a dotted split": (csvs("a.csv"), None, {"data_files": {"a.b": "a.csv"}}),
    "a split that is no word": (csvs("a.csv"), None, {"data_files": {"a-b": "a.csv"}}),
    "a file twice": (csvs("a.csv"), None, {"data_files": ["a.csv", "*.csv"]}),
    "one file in two splits": (csvs("a.csv"), None, {"data_files": {"train": "a.csv", "test": "a.csv"}}),
    "a path from here": (csvs("x/a.csv"), None, {"data_files": "./x/a.csv"}),
    "a missing file": (csvs("a.csv"), None, {"data_files": "b.csv"}),
    "a pattern that hits nothing": (csvs("a.csv"), None, {"data_files": "b*.csv"}),
    "a split whose pattern hits nothing": (csvs("a.csv"), None, {"data_files": {"train": "a.csv", "test": "b*.csv"}}),
    "a list with a pattern that hits nothing": (csvs("a.csv"), None, {"data_files": ["b*.csv", "a.csv"]}),
    "a folder": (csvs("x/a.csv"), None, {"data_files": "x"}),
    "all below a folder": (csvs("x/a.csv", "x/y/b.csv", "c.csv"), None, {"data_files": "x/**"}),
    "names that the conventions would choose": (csvs("train.csv", "test.csv"), None, {"data_files": "test.csv"}),
    "another format than the rest": ({**csvs("a.csv", "b.csv"), "c.jsonl": JSONL}, None, {"data_files": "c.jsonl"}),
    "mixed formats are not filtered": (
        {**csvs("d/a.csv", "d/b.csv"), "d/c.txt": "a,b\n9,z\n"},
        None,
        {"data_files": "d/*"},
    ),
    "a file of no known format": ({"a.weird": CSV}, None, {"data_files": "a.weird"}),
    "a known format and none": ({**csvs("a.csv", "b.csv"), "c.weird": CSV}, None, {"data_files": "[abc].*"}),
    "splits of two formats": (
        {**csvs("a.csv"), "b.jsonl": JSONL},
        None,
        {"data_files": {"train": "a.csv", "test": "b.jsonl"}},
    ),
    "tabs": ({"a.tsv": "a\tb\n1\tx\n"}, None, {"data_files": "a.tsv"}),
    "an ignored name": ({"config.json": JSONL, "a.json": JSONL}, None, {"data_files": "config.json"}),
    "a hidden file": (csvs(".a.csv", "b.csv"), None, {"data_files": ".a.csv"}),
    "a hidden file by a star": (csvs(".a.csv", "b.csv"), None, {"data_files": "*.csv"}),
    "a compressed file": (csvs("a.csv.gz", "b.csv"), None, {"data_files": "a.csv.gz"}),
    "a bare double star": (csvs("a.csv", "x/b.csv"), None, {"data_files": "**"}),
    "the only config keeps its settings": (
        SEMICOLONS,
        "configs:\n- config_name: m\n  data_files: b.csv\n  sep: ';'",
        {"data_files": "c.csv"},
    ),
    "a named config keeps its settings": (SEMICOLONS, TWO, {"name": "b", "data_files": "c.csv"}),
    "no config in particular has none": (SEMICOLONS, TWO, {"data_files": "c.csv"}),
    "the default config keeps its settings": (SEMICOLONS, TWO + "\n  default: true", {"data_files": {"test": "c.csv"}}),
    "an unknown config": (SEMICOLONS, TWO, {"name": "c", "data_files": "c.csv"}),
    "the name default without configs": (csvs("a.csv"), None, {"name": "default", "data_files": "a.csv"}),
    "another name without configs": (csvs("a.csv"), None, {"name": "other", "data_files": "a.csv"}),
    "features of the config count": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: m\n  data_files: a.csv\n  features:\n  - {name: a, dtype: int8}\n  - {name: b, dtype: string}",
        {"data_files": "b.csv"},
    ),
    "features of the config count for json": (
        {"a.jsonl": JSONL, "b.jsonl": JSONL},
        "configs:\n- config_name: m\n  data_files: a.jsonl\n  features:\n  - {name: a, dtype: int8}\n  - {name: b, dtype: string}",
        {"data_files": "b.jsonl"},
    ),
    "dataset_info does not count": (
        {"a.jsonl": JSONL, "b.jsonl": JSONL},
        "dataset_info:\n  features:\n  - {name: a, dtype: int8}\n  - {name: b, dtype: string}",
        {"data_files": "b.jsonl"},
    ),
    "a lone dataset_info of another name": (
        csvs("a.csv"),
        "dataset_info:\n  config_name: other\n  splits: []",
        {"data_files": "a.csv"},
    ),
    "a folder's own conventions": (
        csvs("en/train.csv", "en/test.csv", "fr/train.csv", "train.csv"),
        None,
        {"data_dir": "en"},
    ),
    "a folder with a slash": (csvs("en/x.csv", "fr/train.csv"), None, {"data_dir": "en/"}),
    "a folder from here": (csvs("en/x.csv", "fr/train.csv"), None, {"data_dir": "./en"}),
    "a folder in a folder": (csvs("a/en/test/x.csv", "a/train.csv"), None, {"data_dir": "a/en"}),
    "a folder whose name is a split": (csvs("train/a.csv", "train/b.csv", "test/c.csv"), None, {"data_dir": "test"}),
    "a folder with sharded names": (
        csvs("en/data/train-00000-of-00001.csv", "en/data/dev-00000-of-00001.csv", "en/other.csv"),
        None,
        {"data_dir": "en"},
    ),
    "a hidden folder": (csvs(".en/train.csv", "a.csv"), None, {"data_dir": ".en"}),
    "a missing folder": (csvs("en/train.csv"), None, {"data_dir": "fr"}),
    "a folder and files": (csvs("en/x.csv", "en/y.csv", "x.csv"), None, {"data_dir": "en", "data_files": "x.csv"}),
    "a folder and mixed files are filtered": (
        {**csvs("d/a.csv", "d/b.csv"), "d/c.txt": "a,b\n9,z\n"},
        None,
        {"data_dir": "d", "data_files": "*"},
    ),
    "a folder instead of a config's files": (
        csvs("a.csv", "en/train.csv", "en/test.csv"),
        "configs:\n- config_name: m\n  data_files: a.csv",
        {"data_dir": "en"},
    ),
    "a folder and a config's settings": (
        {"a.csv": "a;b\n1;x\n", "en/a.csv": "a;b\n2;y\n"},
        "configs:\n- config_name: m\n  data_files: a.csv\n  sep: ';'",
        {"name": "m", "data_dir": "en"},
    ),
    "a folder and several configs": (
        csvs("a.csv", "b.csv", "en/test.csv"),
        "configs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv",
        {"data_dir": "en"},
    ),
    "types of csv": (csvs("a.csv", "b.csv"), None, {"features": NARROW}),
    "types of json": ({"a.jsonl": JSONL, "b.jsonl": JSONL}, None, {"features": NARROW}),
    "types before those of dataset_info": (
        {"a.jsonl": JSONL},
        "dataset_info:\n  features:\n  - {name: a, dtype: float32}\n  - {name: b, dtype: string}",
        {"features": NARROW},
    ),
    "types before those of the config": (
        csvs("a.csv"),
        "configs:\n- config_name: m\n  data_files: a.csv\n  features:\n  - {name: a, dtype: float32}\n  - {name: b, dtype: string}",
        {"features": NARROW},
    ),
    "types of chosen files": ({**csvs("a.csv"), "b.jsonl": JSONL}, None, {"data_files": "b.jsonl", "features": NARROW}),
    "labels by name": (
        {"a.jsonl": '{"a": "no"}\n{"a": "yes"}\n'},
        None,
        {"features": datasets.Features({"a": datasets.ClassLabel(names=["no", "yes"])})},
    ),
    "a column more than the file has": (
        {"a.jsonl": JSONL},
        None,
        {"features": datasets.Features({**NARROW, "c": datasets.Value("string")})},
    ),
    "a column that is not declared": ({"a.jsonl": JSONL}, None, {"features": datasets.Features({"a": NARROW["a"]})}),
    "a type that does not fit": (
        {"a.jsonl": JSONL},
        None,
        {"features": datasets.Features({"a": NARROW["a"], "b": datasets.Value("int32")})},
    ),
    "a separator": ({"a.csv": "a;b\n1;x\n"}, None, {"sep": ";"}),
    "a separator before a tab": ({"a.tsv": "a;b\n1;x\n"}, None, {"sep": ";"}),
    "names and rows to skip": (csvs("a.csv"), None, {"names": ["x", "y"], "skiprows": 1}),
    "a setting before the card's": (SEMICOLONS, TWO, {"name": "b", "data_files": "a.csv", "sep": ","}),
    "a field of json": ({"a.json": '{"data": [{"a": 1}, {"a": 2}], "v": 3}'}, None, {"field": "data"}),
    "lines with their ends": ({"a.txt": TXT}, None, {"keep_linebreaks": True}),
    "a setting of another format": ({"a.jsonl": JSONL}, None, {"sep": ";"}),
    "a setting of nothing": (csvs("a.csv"), None, {"colour": "red"}),
    "a config by name": (SEMICOLONS, TWO, {"name": "b"}),
    "several configs and no name": (SEMICOLONS, TWO, {}),
}
"""Arguments of `load_dataset`: files, the card, and the arguments beside the folder."""

EXTRA: dict[str, tuple[dict[str, str], str | None]] = {
    name: ({**files, ".huggingface.yaml": extra}, text)
    for name, (files, extra, text) in {
        "alone": (csvs("a.csv", "b.csv"), "configs:\n- config_name: n\n  data_files: b.csv\n", None),
        "instead of the card's": (
            csvs("a.csv", "b.csv"),
            "configs:\n- config_name: n\n  data_files: b.csv\n",
            "configs:\n- config_name: m\n  data_files: a.csv",
        ),
        "beside what the card says": (
            {"a.jsonl": JSONL, "b.jsonl": JSONL},
            "configs:\n- config_name: n\n  data_files: b.jsonl\n",
            "dataset_info:\n  config_name: n\n  features:\n  - {name: a, dtype: float32}\n  - {name: b, dtype: string}",
        ),
        "empty": (csvs("a.csv", "b.csv"), "", "configs:\n- config_name: m\n  data_files: a.csv"),
        "a list": (csvs("a.csv"), "- a\n", None),
        "with lines of dashes": (
            csvs("a.csv", "b.csv"),
            "---\nconfigs:\n- config_name: n\n  data_files: b.csv\n",
            None,
        ),
    }.items()
}
"""Repos with a `.huggingface.yaml`: files, and the card."""

ROWS: dict[str, tuple[dict[str, str], str | None]] = {
    "ten files sort by name, not by number": (csvs(*(f"part-{n}.csv" for n in range(12))), None),
    "a folder sorts beside files": (csvs("a.csv", "a/b.csv", "a-b.csv", "a.b.csv", "A.csv", "é.csv", "a b.csv"), None),
    "split folders in folders": (csvs("x/train/2.csv", "a/train/1.csv", "train/0.csv", "b/test/9.csv"), None),
    "a file that two words match comes twice": (csvs("train-training.csv", "train.csv"), None),
    "words in the order of the patterns": (csvs("val.csv", "dev.csv", "valid.csv", "validation.csv"), None),
    "sharded names of twelve": ({f"data/train-{n:05d}-of-00012.csv": CSV for n in range(12)}, None),
    "columns in another order": ({"a.csv": "a,b\n1,x\n", "b.csv": "b,a\ny,2\n"}, None),
    "fields in another order": ({"a.jsonl": '{"a": 1, "b": "x"}', "b.jsonl": '{"b": "y", "a": 2}'}, None),
    "empty lines and files": ({"a.jsonl": '{"a": 1}\n\n{"a": 2}\n', "b.jsonl": ""}, None),
    "types of json": ({"a.jsonl": '{"a": 1, "b": [1.5], "c": {"d": null, "e": "x"}, "f": true}\n' * 3}, None),
    "an array of json": ({"train.json": '[{"a": 1}, {"a": null}]', "test.json": '[{"a": 3}]'}, None),
    "labels and dates": (
        {"a.csv": "a,b,c\n1,2020-01-02,x\n0,2021-03-04,y\n"},
        "dataset_info:\n  features:\n  - name: a\n    dtype:\n      class_label:\n        names:\n          '0': nein\n          '1': ja\n  - {name: b, dtype: string}\n  - {name: c, dtype: string}",
    ),
    "text of two files": ({"b.txt": TXT, "a.txt": TXT}, None),
    "tabs in splits": ({"train.tsv": "a\tb\n1\tx\n", "test.tsv": "a\tb\n2\ty\n"}, None),
    "a tsv beside a csv": ({"a.csv": CSV, "b.csv": CSV, "c.tsv": CSV}, None),
    "compressed lines": ({"train-0.jsonl.gz": JSONL, "train-1.jsonl.gz": JSONL, "test.jsonl.gz": JSONL}, None),
    "configs by folder": (
        {**csvs("en/train.csv", "en/dev.csv"), **csvs("fr/0.csv", "fr/1.csv")},
        "configs:\n- config_name: en\n  data_dir: en\n- config_name: fr\n  data_dir: fr\n  default: true",
    ),
    "the layout of a convert branch": (csvs("default/train/0000.csv", "default/test/0000.csv", "b/train/0.csv"), None),
    "a partial convert branch": (csvs("default/partial-train/0000.csv", "default/partial-train/0001.csv"), None),
    "one file in two configs": (
        csvs("a.csv", "b.csv"),
        "configs:\n- config_name: all\n  data_files: '*.csv'\n- config_name: a\n  data_files:\n  - split: test\n    path: a.csv",
    ),
}
"""More layouts for the test that compares rows: files, and the card."""
