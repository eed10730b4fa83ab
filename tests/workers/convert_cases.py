# ruff: noqa: E501  # the YAML of a card is a line of its own
"""Whole repos for the differential test of conversion: name -> files and the YAML of the card."""

from __future__ import annotations

CSV_HEAD = "a,b\n"
REPOS: dict[str, tuple[dict[str, str], str]] = {
    "csv files in the order of their names": (
        {f"train-{n}.csv": f"{CSV_HEAD}{n},x{n}\n" for n in (10, 2, 1)} | {"test.csv": f"{CSV_HEAD}9,z\n"},
        "",
    ),
    "json files with keys that come and go": (
        {"a.jsonl": '{"a": 1, "b": "x"}\n', "b.jsonl": '{"b": "y"}\n{"a": 3}\n'},
        "",
    ),
    "json files whose later numbers are whole": ({"a.jsonl": '{"a": 1.5}\n', "b.jsonl": '{"a": 2}\n'}, ""),
    "json files whose later texts are numbers": ({"a.jsonl": '{"a": "x"}\n', "b.jsonl": '{"a": 2}\n'}, ""),
    "json with mixed keys": ({"a.jsonl": '{"m": [{"x": 1}, {"y": "z"}]}\n{"m": []}\n'}, ""),
    "text": ({"train.txt": "one\ntwo\n", "validation.txt": "three"}, ""),
    "a config with a separator and splits": (
        {"x/1.csv": "a;b\n1;x\n", "x/2.csv": "a;b\n2;y\n"},
        "configs:\n- config_name: m\n  sep: ';'\n  data_files:\n  - split: late\n    path: x/2.csv\n  - split: early\n    path: x/*",
    ),
    "features of a config over csv": (
        {"a.csv": "n,s,l\n007,5,0\n8,x,1\n"},
        "configs:\n- config_name: m\n  data_files: a.csv\n  features:\n  - {name: n, dtype: int16}\n  - {name: s, dtype: string}\n"
        "  - name: l\n    dtype:\n      class_label:\n        names: {'0': nay, '1': yea}",
    ),
    "features of dataset_info over csv": (
        {"a.csv": "n,s\n7,5\n8,6\n"},
        "dataset_info:\n  features:\n  - {name: n, dtype: float32}\n  - {name: s, dtype: string}",
    ),
    "features of dataset_info over json": (
        {"a.jsonl": '{"n": 1, "l": "yea"}\n{"l": "nay"}\n'},
        "dataset_info:\n  features:\n  - name: l\n    dtype:\n      class_label:\n        names: {'0': nay, '1': yea}\n"
        "  - {name: n, dtype: float32}\n  - {name: absent, dtype: image}",
    ),
    "features of a list of structs over json": (
        {"a.jsonl": '{"m": [{"r": "u", "c": "hi"}, {"c": "yo"}]}\n{"m": null}\n'},
        "dataset_info:\n  features:\n  - name: m\n    list:\n    - {name: r, dtype: string}\n    - {name: c, dtype: string}",
    ),
    "a json feature over text and objects": (
        {"a.jsonl": '{"m": {"x": 1}}\n{"m": "plain"}\n{"m": [1]}\n{"m": null}\n'},
        "dataset_info:\n  features:\n  - {name: m, dtype: json}",
    ),
    "objects declared as strings": (
        {"a.jsonl": '{"m": {"x": "a/b é", "y": [1]}}\n{"m": null}\n{"m": {"x": null, "y": []}}\n'},
        "dataset_info:\n  features:\n  - {name: m, dtype: string}",
    ),
    "mixed values declared as strings": (
        {"a.jsonl": '{"m": "x"}\n{"m": 1}\n{"m": null}\n'},
        "dataset_info:\n  features:\n  - {name: m, dtype: string}",
    ),
    "features of a config over some csv columns": (
        {"a.csv": "n,s,t\n 7 ,5,x\n+8,6,y\n"},
        "configs:\n- config_name: m\n  data_files: a.csv\n  features:\n  - {name: s, dtype: string}\n  - {name: n, dtype: int16}",
    ),
    "text under another name": (
        {"a.txt": "one\n"},
        "configs:\n- config_name: m\n  data_files: a.txt\n  features:\n  - {name: line, dtype: large_string}",
    ),
}
