# a case is the text of one file, however long its lines
"""Files for the differential test of the readers: name -> (file name, bytes, settings of the builder)."""

from __future__ import annotations

import bz2
import gzip
import lzma
from typing import Any

Case = tuple[str, bytes, dict[str, Any]]

Texts = dict[str, tuple[str, dict[str, Any]]]

_CSV: Texts = {
    "integers floats text booleans": ("i,f,s,b\n1,1.5,x,True\n-2,2,y,False\n", {}),
    "gaps of each kind": ("i,f,s,b\n1,1.5,x,True\n,,,\n3,2.5,z,False\n", {}),
    "a column of gaps": ("a,b\n1,\n2,\n", {}),
    "signs and spaces": ("a\n+5\n 6\n7 \n", {}),
    "floats of all spellings": ("a\n1.\n.5\n+1.5\n1e5\n-2E-3\nInfinity\n-inf\n", {}),
    "one text among numbers": ("a\n1\nx\n3\n", {}),
    "booleans and numbers": ("a\nTrue\n1\n", {}),
    "booleans of all spellings": ("a,b,c\nTRUE,true,True\nFALSE,false,False\n", {}),
    "leading zeros": ("a\n007\n8\n", {}),
    "numbers past 64 bits": ("a,b\n18446744073709551615,9223372036854775807\n1,1\n", {}),
    "numbers with underscores or hex": ("a,b\n1_000,0x10\n", {}),
    "all words for nothing": (
        "a,b\n" + "".join(f"{w},x\n" for w in ("NA", "N/A", "null", "None", "nan", "#N/A", "<NA>", "n/a")) + "1,y\n",
        {},
    ),
    "words close to nothing": ("a\nna\nNone \nNil\n-\n", {}),
    "quotes": ('a,b\n"x ""q"" y","l\nm"\n"",z\n"1",2\n', {}),
    "quoted words for nothing": ('a,b\n"NA",1\n"x",2\n', {}),
    "blank lines": ("a,b\n\n1,2\n\n\n3,4\n\n", {}),
    "windows line ends": ("a,b\r\n1,x\r\n2,y\r\n", {}),
    "old mac line ends": ("a,b\r1,x\r2,y\r", {}),
    "no line end at the end": ("a,b\n1,2", {}),
    "a byte order mark": ("\ufeffa,b\n1,2\n", {}),
    "names twice and empty": ("a,a,,b,\n1,2,3,4,5\n", {}),
    "names with spaces": (" a,b c \n1,2\n", {}),
    "short rows": ("a,b,c\n1,x\n2,y,z\n3\n", {}),
    "text with accents": ("é,b\nñ,日本\n", {}),
    "one column": ("a\nx\ny\n", {}),
    "another separator": ("a;b\n1;x,y\n", {"sep": ";"}),
    "a delimiter": ("a|b\n1|x\n", {"delimiter": "|"}),
    "no header": ("1,x\n2,y\n", {"header": None}),
    "names given": ("1,x\n2,y\n", {"names": ["p", "q"]}),
    "names instead of the header": ("a,b\n2,y\n", {"column_names": ["p", "q"], "header": 0}),
    "nothing is nothing": ("a,b\nNA,\nx,y\n", {"keep_default_na": False}),
    "another word for nothing": ("a,b\n?,1\nx,2\n", {"na_values": ["?"]}),
    "no gaps at all": ("a,b\nNA,\nx,y\n", {"na_filter": False}),
    "skipped rows": ("# about\na,b\n1,2\n", {"skiprows": 1}),
    "single quotes": ("a,b\n'x,y',2\n", {"quotechar": "'"}),
    "dates stay text": ("a\n2020-01-01\n2020-01-02\n", {}),
    "thirty thousand rows": ("a,b,c\n" + "".join(f"{n},{n / 7:.3f},t{n % 13}\n" for n in range(30_000)), {}),
    "a gap after the first chunk": ("a,b\n" + "".join(f"{n},{n}\n" for n in range(10_500)) + ",7\n", {}),
}
CSV: dict[str, Case] = {name: ("a.csv", text.encode(), settings) for name, (text, settings) in _CSV.items()}
CSV["latin 1"] = ("a.csv", "a,b\né,1\n".encode("latin-1"), {"encoding": "latin-1"})
CSV["gzip"] = ("a.csv.gz", gzip.compress(b"a,b\n1,x\n"), {})
CSV["tab separated"] = ("a.tsv", b"a\tb\n1\tx,y\n", {})

JSON: dict[str, Case] = {
    name: ("a.jsonl", text.encode(), {})
    for name, text in {
        "flat": '{"a": 1, "b": "x", "c": 1.5, "d": true}\n{"a": 2, "b": "y", "c": 2, "d": false}\n',
        "nulls": '{"a": null, "b": 1}\n{"a": "x", "b": null}\n',
        "only nulls": '{"a": null}\n{"a": null}\n',
        "integers then floats": '{"a": 1}\n{"a": 2.5}\n',
        "missing keys": '{"a": 1}\n{"b": "x"}\n{"a": 3, "b": "y"}\n',
        "keys in another order": '{"a": 1, "b": 2}\n{"b": 3, "a": 4}\n',
        "dates": '{"a": "2020-01-01"}\n{"a": "2021-02-03"}\n',
        "dates and text": '{"a": "2020-01-01"}\n{"a": "x"}\n',
        "lists": '{"a": [1, 2], "b": []}\n{"a": [], "b": []}\n',
        "lists of lists": '{"a": [[1], [2, 3]]}\n{"a": []}\n',
        "structs": '{"a": {"x": 1, "y": "s"}}\n{"a": {"x": 2, "y": null}}\n',
        "structs of other keys": '{"a": {"x": 1}}\n{"a": {"y": "s"}}\n',
        "structs of other keys in lists": '{"a": [{"x": 1}, {"y": 2}]}\n{"a": []}\n',
        "empty structs": '{"a": {}}\n{"a": {}}\n',
        "chat messages": '{"m": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}\n',
        "tool calls": '{"m": [{"role": "user", "content": "hi"}, {"role": "bot", "tool": {"n": 1}}]}\n',
        "text and numbers": '{"a": "x"}\n{"a": 1}\n{"a": "2"}\n',
        "text and structs": '{"a": "x"}\n{"a": {"b": 1}}\n',
        "mixed items": '{"a": [1, "x", null]}\n',
        "mixed deep": '{"a": {"b": {"c": 1}}}\n{"a": {"b": {"c": "x"}}}\n',
        "null structs": '{"a": {"x": 1}}\n{"a": null}\n',
        "blank lines": '{"a": 1}\n\n{"a": 2}\n\n',
        "windows line ends": '{"a": 1}\r\n{"a": 2}\r\n',
        "no line end at the end": '{"a": 1}\n{"a": 2}',
        "a byte order mark": '\ufeff{"a": 1}\n',
        "accents and escapes": '{"a": "é\\u00e9\\ud83d\\ude00\\n\\"", "日": "本"}\n',
        "big numbers": '{"a": 9007199254740993, "b": -9223372036854775808}\n',
        "an array of objects": '[{"a": 1, "b": "x"},\n {"a": 2, "b": "y"}]',
        "an array of objects in one line": '[{"a": 1}, {"a": 2}]',
        "an array of texts": '["x", "y"]',
        "a pretty printed array": '[\n  {\n    "a": 1\n  },\n  {\n    "a": 2\n  }\n]\n',
        "an array with other keys": '[{"a": {"x": 1}}, {"a": {"y": 2}}]',
        "one pretty printed object": '{\n  "a": [1, 2],\n  "b": {"c": "x"}\n}\n',
        "one object a line without spaces": '{"a":1}\n{"a":2}\n',
        "many rows": "".join(f'{{"n": {n}, "t": "row {n}", "l": [{n}]}}\n' for n in range(5_000)),
    }.items()
}
JSON["a field"] = ("a.json", b'{"version": 1, "data": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]}', {"field": "data"})
JSON["utf-16"] = ("a.jsonl", '{"a": "é"}\n{"a": "x"}\n'.encode("utf-16"), {"encoding": "utf-16"})
JSON["gzip"] = ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n'), {})
JSON["gzip of two members"] = ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}\n'), {})
JSON["bzip2"] = ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n'), {})
JSON["xz"] = ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n'), {})

_TEXT: Texts = {
    "lines": ("one\ntwo\nthree\n", {}),
    "no line end at the end": ("one\ntwo", {}),
    "empty lines": ("one\n\n\ntwo\n\n", {}),
    "all line ends": ("one\r\ntwo\rthree\n", {}),
    "other separators are no line ends": ("one\u2028two\x0bthree\x0cfour\n", {}),
    "line breaks kept": ("one\n\ntwo", {"keep_linebreaks": True}),
    "paragraphs": ("one\ntwo\n\nthree\n\n\n\nfour", {"sample_by": "paragraph"}),
    "a document": ("one\n\ntwo\n", {"sample_by": "document"}),
    "a byte order mark": ("\ufeffone\n", {}),
}
TEXT: dict[str, Case] = {name: ("a.txt", text.encode(), settings) for name, (text, settings) in _TEXT.items()}
TEXT["latin 1"] = ("a.txt", "é\n".encode("latin-1"), {"encoding": "latin-1"})

ALL: dict[str, tuple[str, Case]] = {
    f"{builder}: {name}": (builder, case)
    for builder, cases in (("csv", CSV), ("json", JSON), ("text", TEXT))
    for name, case in cases.items()
}
