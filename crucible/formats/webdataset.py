"""WebDataset: tar archives whose files of one key, next to each other, are the fields of one row.

Grouping, names and types of the fields are those of `datasets`: images, audio, video and meshes are carried as bytes
with the name they had, text, numbers, JSON and numpy arrays are decoded, anything else stays bytes, also `.msg`,
`.cbor`, `.pth`, `.npz` and `.ten`, which `datasets` decodes with other libraries. `__key__` and `__url__` come last,
`__url__` being the path in the repo, where `datasets` has the place of its copy on one disk.

The archive is a stream from its first byte to its last, so memory holds one batch of rows.
"""

from __future__ import annotations

import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crucible.errors import CorruptFile
from crucible.feature_types import MEDIA, Feature, arrow_type, feature_of, parse_features, schema_of
from crucible.formats.extensions import IMAGE, SOUND, VIDEO
from crucible.formats.limits import Limits
from crucible.formats.parquet import BATCH_BYTES, first_line
from crucible.formats.streams import decompressed, open_bytes
from crucible.formats.tars import tar_members
from crucible.refs import ReadOptions

Sample = dict[str, Any]

BATCH_ROWS = 1024
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_FIELD_COMPRESSION = {"gz": "gzip", "bz2": "bz2", "xz": "xz", "zst": "zstd", "lz4": "lz4"}
_MEDIA_EXTENSIONS: dict[str, str] = {
    # a later kind takes an extension over from an earlier one, as in `datasets`: `.mpeg` is a video
    **dict.fromkeys(("h5", "hdf", *IMAGE.split()), "Image"),
    **dict.fromkeys(SOUND.split(), "Audio"),
    **dict.fromkeys(VIDEO.split(), "Video"),
    **dict.fromkeys(("glb", "ply", "stl"), "Mesh"),
}


def read_webdataset(
    path: Path, name: str, options: ReadOptions, limits: Limits | None = None
) -> Iterator[pa.RecordBatch]:
    declared = parse_features(options.features) if options.features is not None else None
    columns = _Columns(name, declared)
    rows: list[Sample] = []
    size = 0
    for sample, sample_bytes in _samples(path, name, limits or Limits()):
        if rows and (size + sample_bytes > BATCH_BYTES or len(rows) == BATCH_ROWS):
            yield columns.batch(rows)
            rows, size = [], 0
        rows.append(sample)
        size += sample_bytes
    if rows:
        yield columns.batch(rows)


def _samples(path: Path, name: str, limits: Limits) -> Iterator[tuple[Sample, int]]:
    """The archive's rows, with about how many bytes each has."""
    sample: Sample = {}
    size = 0
    for member, content in _members(path, name, limits):
        match = _NAME.fullmatch(member)
        if match is None:
            continue
        key, field = match[1], match[2]
        if sample and sample["__key__"] != key:
            names = {"__key__": sample.pop("__key__"), "__url__": sample.pop("__url__")}
            yield {**sample, **names}, size
            sample, size = {}, 0
        if field in sample:
            raise CorruptFile(name, repr(member), f"a second {field!r} for {key!r}")
        # the names first, as in `datasets`: so they stay in the last sample of an archive
        sample.setdefault("__key__", key)
        sample.setdefault("__url__", name)
        sample[field], got = _decode(content, member, name, limits)
        size += got
        limits.check_row(name, repr(key), size)
    if sample:
        yield sample, size


def _members(path: Path, name: str, limits: Limits) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the regular files, but for hidden ones."""

    with open_bytes(path, name) as stream:
        for member, content in tar_members(stream, name, limits):
            if not member.rpartition("/")[2].startswith((".", "__")):
                yield member, content


_UNDECODABLE = (ValueError, RecursionError, OverflowError, MemoryError, EOFError, SyntaxError, tokenize.TokenError)
"""Tokens: numpy takes the header of an array apart with them."""


def _decode(content: bytes, member: str, name: str, limits: Limits) -> tuple[Any, int]:
    """The value of a field, and its size in bytes."""
    rest, _, extension = member.rpartition("/")[2].lower().rpartition(".")
    if extension in _FIELD_COMPRESSION:
        content = decompressed(content, _FIELD_COMPRESSION[extension], f"{name}: {member}", limits)
        extension = rest.rpartition(".")[2]
    decode = _DECODERS.get(extension)
    if decode is None:
        return content, len(content)
    try:
        return decode(content), len(content)
    except _UNDECODABLE as error:
        raise CorruptFile(name, repr(member), f"not what its name says ({first_line(error)})") from error


def _text(content: bytes) -> str:
    return content.decode("utf-8")


def _array(content: bytes) -> Any:
    """A numpy file as lists of one-dimensional arrays, so that items keep their type. Never unpickles."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are never unpickled")
    if math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError("its header does not fit its size")  # checked first: numpy would make room for any claim
    stream.seek(0)
    return _lists(np.lib.format.read_array(stream, allow_pickle=False))


def _lists(array: Any) -> Any:
    if array.ndim == 0:
        return array[()]
    return array if array.ndim == 1 else [_lists(part) for part in array]


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text", "transcript"), _text),
    **dict.fromkeys(("cls", "cls2", "index", "inx", "id"), int),
    **dict.fromkeys(("json", "jsn"), json.loads),
    "npy": _array,
}


class _Columns:
    """Rows to batches. What is a media column is said by the declared features, else by the field's extension."""

    def __init__(self, name: str, declared: dict[str, Feature] | None) -> None:
        self.name, self.declared = name, declared

    def batch(self, rows: list[Sample]) -> pa.RecordBatch:
        fields = self.declared or dict.fromkeys(field for row in rows for field in row)
        features: dict[str, Feature] = {}
        arrays = []
        for field in fields:
            media = self._media(field)
            values = [row.get(field) for row in rows]
            try:
                if media is not None:
                    features[field] = media
                    pairs = [
                        None if value is None else {"bytes": value, "path": f"{row['__key__']}.{field}"}
                        for row, value in zip(rows, values, strict=True)
                    ]
                    arrays.append(pa.array(pairs, arrow_type(media)))
                else:
                    made = pa.array(values)
                    features[field] = feature_of(made.type)
                    arrays.append(made)
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                where = f"field {field!r}, {rows[0]['__key__']!r} to {rows[-1]['__key__']!r}"
                raise CorruptFile(self.name, where, f"values of no common type ({first_line(error)})") from error
        return pa.RecordBatch.from_arrays(arrays, schema=schema_of(features))

    def _media(self, field: str) -> Feature | None:
        if self.declared is not None:
            feature = self.declared[field]
            return feature if arrow_type(feature) == MEDIA else None
        found = _MEDIA_EXTENSIONS.get(field.rsplit(".", 1)[-1].lower())
        return {"_type": found} if found is not None else None
