"""Folders of images, sounds or videos: a row a file, with its bytes and its name; or a row a line of a metadata file.

What a row has besides its file was decided when the items were planned, and travels in the options: `labels` says that
the folder a file lies in is its label, `metadata` that the rows are those of metadata files, which name the files. An
item is then one metadata file, some of its rows and the files these name (`rows`), or archives with all in them.

Memory holds the files of one batch of rows, at most `Limits.row_bytes` more than 16 MiB.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from crucible.errors import CorruptFile
from crucible.feature_types import (
    MEDIA,
    Feature,
    arrow_type,
    dump_features,
    feature_of,
    features_of,
    is_struct,
    kind,
    parse_features,
    schema_of,
)
from crucible.formats.archives import is_zip, open_zip
from crucible.formats.csv import read_csv
from crucible.formats.extensions import AUDIO, IMAGE, MESH, NIFTI, PDF, VIDEO
from crucible.formats.json import read_json
from crucible.formats.limits import Limits
from crucible.formats.parquet import BATCH_BYTES, read_parquet
from crucible.formats.read import check_columns
from crucible.refs import ReadOptions


@dataclass(frozen=True, slots=True)
class FolderKind:
    """What a builder's folders hold: `datasets` names the column after it."""

    column: str
    feature: str
    extensions: frozenset[str]

    def holds(self, path: str) -> bool:
        """True for a file of this kind, also compressed: `a.png`, `a.png.gz`."""
        root, last = posixpath.splitext(path)
        return last.lower() in self.extensions or posixpath.splitext(root)[1].lower() in self.extensions


def _kind(column: str, extensions: str) -> FolderKind:
    return FolderKind(column, column.capitalize(), frozenset("." + one for one in extensions.split()))


FOLDERS: Mapping[str, FolderKind] = {
    "imagefolder": _kind("image", IMAGE),
    "audiofolder": _kind("audio", AUDIO),
    "videofolder": _kind("video", VIDEO),
    "meshfolder": _kind("mesh", MESH),
    "pdffolder": _kind("pdf", PDF),
    "niftifolder": _kind("nifti", NIFTI),
}

METADATA_READERS: Mapping[str, tuple[Callable[..., Iterator[pa.RecordBatch]], str]] = {
    ".csv": (read_csv, "csv"),
    ".jsonl": (read_json, "json"),
    ".parquet": (read_parquet, "parquet"),
}
_BATCH_ROWS = 1024


Find = Callable[[str | None], Any]
"""What stands for a file that a row names, or for none."""


def has_extension_of(path: str, folder: FolderKind) -> bool:
    """True for a file of this kind by its last extension: only such a file's folder is a label."""
    return posixpath.splitext(path)[1].lower() in folder.extensions


def label_of(path: str) -> str:
    """The name of the folder that a file lies in."""
    return posixpath.basename(posixpath.dirname(path))


def metadata_reader(name: str, declared: Mapping[str, Feature] | None) -> Callable[[Path], Iterator[pa.RecordBatch]]:
    """A reader of a metadata file's rows as the file has them. Raises CorruptFile for a name of another format."""
    read, builder = METADATA_READERS.get(posixpath.splitext(name)[1], (None, ""))
    if read is None:
        raise CorruptFile(name, "", f"metadata files end in {', '.join(METADATA_READERS)}")
    plain = ReadOptions(builder, (("on_mixed_types", '"error"'),) if builder == "json" else ())

    def rows(path: Path) -> Iterator[pa.RecordBatch]:
        options = plain
        first = next(read(path, name, plain), None) if declared else None
        if first is not None and declared:
            found = features_of(first.schema)
            # a column that is declared as text keeps what the file says
            chosen = {
                column: declared[column]
                if column in declared and arrow_type(declared[column]) != MEDIA
                else feature_of(first.schema.field(column).type)
                for column in found
            }
            options = ReadOptions(builder, plain.params, dump_features(chosen))
        yield from read(path, name, options)

    return rows


@dataclass(frozen=True, slots=True)
class Join:
    """A column that names files, as the column that has them."""

    name: str
    feature: Feature
    put: Callable[[Any, Find], Any]
    """A value, with what the second argument gives in the place of each file name."""


def join_of(column: str, feature: Feature, folder: FolderKind) -> Join | None:
    """How `file_name`, `*_file_name`, `file_names` or `*_file_names` become files, at any depth; None for others."""
    media = {"_type": folder.feature}
    if _is_text(feature) and (column == "file_name" or column.endswith("_file_name")):
        return Join(column[: -len("_file_name")] or folder.column, media, lambda value, find: find(value or None))
    several = kind(feature) == "List" and _is_text(feature["feature"])
    if several and (column == "file_names" or column.endswith("_file_names")):
        name = column[: -len("_file_names")] or folder.column + "s"
        return Join(name, {"feature": media, "_type": "List"}, _each(lambda value, find: find(value or None)))
    if is_struct(feature):
        below = {key: join_of(key, inner, folder) for key, inner in feature.items()}
        if any(below.values()):
            fields = {
                (join.name if (join := below[key]) else key): (join.feature if join else inner)
                for key, inner in feature.items()
            }
            return Join(column, fields, _struct(below))
    if kind(feature) in ("List", "LargeList") and is_struct(feature["feature"]):
        inside = join_of(column, feature["feature"], folder)
        if inside is not None:
            return Join(column, {**feature, "feature": inside.feature}, _each(inside.put))
    return None


def _is_text(feature: Feature) -> bool:
    return kind(feature) == "Value" and feature["dtype"] in ("string", "large_string")


def _each(put: Callable[[Any, Find], Any]) -> Callable[[Any, Find], Any]:
    return lambda value, find: None if value is None else [put(one, find) for one in value]


def _struct(below: Mapping[str, Join | None]) -> Callable[[Any, Find], Any]:
    def put(value: Any, find: Find) -> Any:
        if value is None:
            return None
        return {
            (join.name if join else key): (join.put(value[key], find) if join else value[key])
            for key, join in below.items()
        }

    return put


def inside(file: str, name: str, base: str, row: int) -> str:
    """The path a row names, from the root of the repo or archive. Raises CorruptFile if it leads out of `base`."""
    path = posixpath.normpath(file).replace("\\", "/")
    if "://" in file or "\0" in file or file.startswith("/") or path == ".." or path.startswith(("/", "../")):
        raise CorruptFile(name, f"row {row:,}", f"names {file!r}, which is not a path inside its folder")
    return posixpath.join(base, path)


def named_files(batch: pa.RecordBatch, name: str, row: int, folder: FolderKind) -> list[list[str]]:
    """For each row of the metadata file `name` the paths it names. `row` is the number of the batch's first row.

    Raises CorruptFile if no column could name any, or for a path that is none.
    """
    joins = {column: join_of(column, feature, folder) for column, feature in features_of(batch.schema).items()}
    if batch.num_rows and not any(joins.values()):
        wanted = "`file_name`, `*_file_name`, `file_names` or `*_file_names`"
        raise CorruptFile(name, "its columns", f"none is {wanted}; there are: {', '.join(joins)}")
    base = posixpath.dirname(name)
    found: list[list[str]] = [[] for _ in range(batch.num_rows)]
    for column, join in joins.items():
        for at, value in enumerate(batch.column(column).to_pylist() if join else ()):

            def note(file: str | None, at: int = at) -> None:
                if file is not None:
                    found[at].append(inside(file, name, base, row + at))

            if join is not None:
                join.put(value, note)
    return found


def with_files(
    batch: pa.RecordBatch, name: str, row: int, folder: FolderKind, content: Callable[[str], bytes]
) -> pa.RecordBatch:
    """Rows of a metadata file with the files that they name. `content` gives a file's bytes by its path."""
    base = posixpath.dirname(name)
    features: dict[str, Feature] = {}
    arrays = []
    for column, feature in features_of(batch.schema).items():
        join = join_of(column, feature, folder)
        made, array = (column, feature), batch.column(column)
        if join is not None:
            values = []
            for at, value in enumerate(array.to_pylist()):

                def find(file: str | None, at: int = at) -> dict[str, Any] | None:
                    if file is None:
                        return None
                    path = inside(file, name, base, row + at)
                    return {"bytes": content(path), "path": posixpath.basename(path)}

                values.append(join.put(value, find))
            made, array = (join.name, join.feature), pa.array(values, arrow_type(join.feature))
        if made[0] in features:
            raise CorruptFile(name, f"column {column!r}", f"there would be two columns {made[0]!r}")
        features[made[0]] = made[1]
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(features))


def read_folder(
    names: Sequence[str], paths: Sequence[Path], options: ReadOptions, limits: Limits, spool: Path
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of an item, each batch with the file it is from. `spool` is a path that may be used for a while."""
    reader = _Reader(options, limits, spool)
    if options.param("metadata") and not is_zip(paths[0]):
        batches = reader.rows_named(names, paths)
    else:
        batches = reader.rows_of_files(names, paths)
    for name, batch in batches:
        there = batch.schema.names
        if reader.declared is not None:  # what is not declared is dropped, what is not there becomes nulls
            there = [column for column in there if column in reader.declared]
        if options.columns is not None:
            check_columns([*there, *(reader.declared or ())], name, options.columns)
            there = [column for column in options.columns if column in there]
        yield name, batch.select(there)


class _Reader:
    def __init__(self, options: ReadOptions, limits: Limits, spool: Path) -> None:
        self._folder = FOLDERS[options.builder]
        self._labels = bool(options.param("labels"))
        self._metadata = bool(options.param("metadata"))
        self._metadata_names = metadata_names(options)
        self._rows = options.param("rows")
        self._limits, self._spool = limits, spool
        self.declared = parse_features(options.features) if options.features is not None else None

    # --- a row a file

    def rows_of_files(self, names: Sequence[str], paths: Sequence[Path]) -> Iterator[tuple[str, pa.RecordBatch]]:
        held: list[tuple[str, bytes]] = []
        size = 0
        for name, path in zip(names, paths, strict=True):
            if is_zip(path) and not self._folder.holds(name):
                if held:
                    yield held[0][0], self._batch(held)
                    held, size = [], 0
                yield from self._archive(name, path)
                continue
            self._limits.check_row(name, "", path.stat().st_size)
            content = path.read_bytes()
            if held and (size + len(content) > BATCH_BYTES or len(held) == _BATCH_ROWS):
                yield held[0][0], self._batch(held)
                held, size = [], 0
            held.append((name, content))
            size += len(content)
        if held:
            yield held[0][0], self._batch(held)

    def _archive(self, name: str, path: Path) -> Iterator[tuple[str, pa.RecordBatch]]:
        with open_zip(path, name, self._limits) as archive:
            if self._metadata:
                for metadata in archive.names:
                    if posixpath.basename(metadata) in self._metadata_names:
                        archive.copy(metadata, self._spool)
                        try:
                            for batch in self._joined(metadata, self._spool, (0, None), archive.read, archive.size):
                                yield name, batch
                        except CorruptFile as error:
                            if error.path != metadata:
                                raise
                            raise CorruptFile(f"{name}/{metadata}", error.where, error.problem) from error
                return
            held: list[tuple[str, bytes]] = []
            size = 0
            for inside in archive.names:
                if not self._folder.holds(inside):
                    continue
                if held and (size + archive.size(inside) > BATCH_BYTES or len(held) == _BATCH_ROWS):
                    yield name, self._batch(held)
                    held, size = [], 0
                held.append((inside, archive.read(inside)))
                size += len(held[-1][1])
            if held:
                yield name, self._batch(held)

    def _batch(self, held: Sequence[tuple[str, bytes]]) -> pa.RecordBatch:
        pairs = [{"bytes": content, "path": posixpath.basename(name)} for name, content in held]
        features: dict[str, Feature] = {self._folder.column: {"_type": self._folder.feature}}
        arrays = [pa.array(pairs, MEDIA)]
        if self._labels:
            features["label"] = {"dtype": "string", "_type": "Value"}
            arrays.append(pa.array([label_of(name) for name, _ in held], pa.string()))
        return pa.RecordBatch.from_arrays(arrays, schema=schema_of(features))

    # --- a row a line of a metadata file

    def rows_named(self, names: Sequence[str], paths: Sequence[Path]) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Some rows of the metadata file that comes first, with the files that come after it."""
        there = dict(zip(names[1:], paths[1:], strict=True))

        def content(file: str) -> bytes:
            return there[file].read_bytes()

        def size(file: str) -> int:
            if file not in there:
                raise CorruptFile(names[0], "", f"names {file!r}, which is not there")
            return there[file].stat().st_size

        start, stop = self._rows
        for batch in self._joined(names[0], paths[0], (start, stop), content, size):
            yield names[0], batch

    def _joined(
        self,
        name: str,
        path: Path,
        wanted: tuple[int, int | None],
        content: Callable[[str], bytes],
        size: Callable[[str], int],
    ) -> Iterator[pa.RecordBatch]:
        start, stop = wanted
        row = 0
        for batch in metadata_reader(name, self.declared)(path):
            last = batch.num_rows if stop is None else min(batch.num_rows, stop - row)
            at = max(0, start - row)
            if not row and start == stop:
                yield with_files(batch.slice(0, 0), name, 0, self._folder, content)
                return
            files = named_files(batch.slice(at, max(0, last - at)), name, row + at, self._folder)
            first = at
            while first < last:
                end, total = first, 0
                while end < last and end - first < _BATCH_ROWS:
                    more = sum(size(file) for file in files[end - at])
                    self._limits.check_row(name, f"row {row + end:,}", more)
                    if end > first and total + more > BATCH_BYTES:
                        break
                    end, total = end + 1, total + more
                yield with_files(batch.slice(first, end - first), name, row + first, self._folder, content)
                first = end
            row += batch.num_rows
            if stop is not None and row >= stop:
                return


def metadata_names(options: ReadOptions) -> frozenset[str]:
    """What metadata files are called."""
    return frozenset(options.param("metadata_filenames") or (f"metadata{end}" for end in METADATA_READERS))
