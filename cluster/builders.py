"""Which reader a split's files need: the most common extension decides, as in `datasets` 5.2. No I/O."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from crucible.cluster.patterns import has_extension, suffixes
from crucible.formats.extensions import AUDIO, IMAGE, MESH, NIFTI, PDF, VIDEO
from crucible.formats.folders import FOLDERS
from crucible.refs import SourceFile

READABLE = ("parquet", "json", "csv", "text", "arrow", "webdataset", *FOLDERS)
"""Builders crucible has a reader for."""
ARCHIVES = 10
"""Zip archives that are looked into to find out what they hold."""
NAMED = frozenset(("webdataset", *FOLDERS))
"""Builders that put names of files into the rows, which are then no function of the bytes alone."""

_PLAIN = {
    "csv": "csv tsv",
    "json": "json jsonl ndjson",
    "parquet": "parquet geoparquet gpq",
    "arrow": "arrow",
    "text": "txt",
    "conll": "conll conllu",
    "webdataset": "tar",
    "xml": "xml",
    "hdf5": "hdf5 h5",
    "eval": "eval",
    "harbor": "toml md",
    "lance": "lance",
    "tsfile": "tsfile",
    "vortex": "vortex",
    "fasta": "fa fasta fna ffn faa frn afa",
    "genbank": "gb gbk genbank",
    "fastq": "fq fastq",
    "pdb": "pdb ent",
    "mmcif": "cif mmcif",
}
# in `datasets`' order: a later kind takes an extension over from an earlier one (`.mpg` is audio, `.mp4` video)
_ANY_CASE = {
    "pdb": "pdb ent",
    "imagefolder": IMAGE,
    "audiofolder": AUDIO,
    "videofolder": VIDEO,
    "meshfolder": MESH,
    "pdffolder": PDF,
    "niftifolder": NIFTI,
}

BUILDER_OF: dict[str, str] = {f".{ext}": builder for builder, exts in _PLAIN.items() for ext in exts.split()}
for _builder, _extensions in _ANY_CASE.items():
    for _ext in _extensions.split():
        BUILDER_OF["." + _ext] = BUILDER_OF["." + _ext.upper()] = _builder

_METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
METADATA_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (*FOLDERS, "mmcif", "pdb"),
        _METADATA_NAMES,
    ),
    "lance": ("latest_version_hint.json",),
    "harbor": ("task.toml", "instruction.md"),
}
_METADATA_EXTENSIONS = {"lance": (".idx", ".txn", ".manifest")}
_ALL_METADATA_NAMES = frozenset(name for names in METADATA_NAMES.values() for name in names)

DATA_EXTENSIONS = frozenset((*BUILDER_OF, ".zip", *_METADATA_EXTENSIONS["lance"]))
"""A file with none of these among its suffixes is not data."""

_TIE = (".parquet", ".lance", ".vortex", ".arrow", ".jsonl", ".json", ".csv")
"""Who wins when two extensions are equally common; after these the alphabetically last."""


@dataclass(frozen=True, slots=True)
class Builder:
    """A reader's name and the settings its extension implies."""

    name: str
    params: tuple[tuple[str, str], ...] = ()


def infer_builder(files: Iterable[SourceFile]) -> Builder | None:
    """The builder of the most common extension over all dot-suffixes, or None. `zip`: look inside."""
    counts: Counter[tuple[str, bool]] = Counter()
    for (end, metadata), number in Counter(
        (suffixes(file.path), file.path.rpartition("/")[2] in _ALL_METADATA_NAMES) for file in files
    ).items():
        for suffix in end:
            counts[suffix.lower(), metadata] += number
    ranked = sorted(
        counts.items(), key=lambda item: (not item[0][1], item[1], *(item[0][0] == e for e in _TIE), item[0][0])
    )
    for (extension, _), _count in reversed(ranked):
        if (builder := _builder_for(extension)) is not None:
            return builder
        if extension == ".zip":
            return Builder("zip")
    return None


def infer_inside(files: Iterable[SourceFile], names_in: Callable[[SourceFile], Iterable[str]]) -> Builder | None:
    """The builder of the most common extension inside the archives, of which at most ten are looked into; or None."""
    counts: Counter[str] = Counter()
    for archive in [file for file in files if file.path.endswith(".zip")][:ARCHIVES]:
        inside = set(names_in(archive))
        for path in list(inside):  # folders count too
            inside.update(path[:at] for at, char in enumerate(path) if char == "/")
        counts.update(suffix.lower() for path in sorted(inside) for suffix in suffixes(path))
    first = next(iter(counts.most_common(1)), None)
    return _builder_for(first[0]) if first is not None else None


def _builder_for(extension: str) -> Builder | None:
    if extension not in BUILDER_OF:
        return None
    params = {".tsv": (("sep", '"\\t"'),), ".conllu": (("comment_prefix", '"#"'),)}.get(extension, ())
    return Builder(BUILDER_OF[extension], params)


def keep_files_of(builder: str, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Files the builder reads: an extension of its own, maybe followed by others, or one of its metadata names."""
    own = {ext for ext, name in BUILDER_OF.items() if name == builder}
    own |= {".zip", *_METADATA_EXTENSIONS.get(builder, ())}
    # an extension inside a folder's name (`a.csv.d/b.txt`) counts too: the oracle matches the whole path
    anywhere = re.compile(f"({'|'.join(map(re.escape, own))})\\.", re.DOTALL)
    names = METADATA_NAMES.get(builder) or ("\0",)

    def keep(path: str) -> bool:
        folder = path.rpartition("/")[0]
        return (
            has_extension(path, own) or path.endswith(names) or ("." in folder and anywhere.search(folder) is not None)
        )

    return tuple(file for file in files if keep(file.path))
