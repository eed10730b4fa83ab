"""From the arguments that name data to a checked request; above all `data_files` and `data_dir`. Pure.

These two say which files to read in place of those that the repo's card says. `data_files` comes in the forms that
`datasets` takes: a pattern, a list of patterns, a dict of split to one or a list of them, or a list of {split, path}.
Patterns are relative to the repo (to `data_dir` when that is given too). An absolute path inside a local folder, and
`hf://datasets/<this repo>/...`, mean the same; anything outside the repo is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from crucible.errors import UsageError
from crucible.hub.client import is_folder, repo_ref
from crucible.refs import DataRequest, RepoRef
from crucible.splits import is_split_name, parse_split
from crucible.urls import hub_place, one_repo

Patterns: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]
"""(split, patterns), in order."""

DataFiles: TypeAlias = "str | os.PathLike[str] | Sequence[Any] | Mapping[str, Any]"
"""What a caller may give."""

FORMATS = (
    *("arrow", "audiofolder", "csv", "imagefolder", "json", "meshfolder", "niftifolder", "parquet", "pdffolder"),
    *("text", "videofolder", "webdataset", "xml"),
)
"""Names of formats that stand for a repo: `load_dataset("csv", data_files=...)` reads files of this disk."""

VERIFICATION = "verification_mode"
"""An argument beside the settings of formats, as in `datasets`."""

_MAGIC = re.compile(r"[*?\[]")
_OUTSIDE = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.-]*://|/|[A-Za-z]:[\\/])|(?:^|/)\.\.(?:/|$)|::")


def is_outside(pattern: str) -> bool:
    """True for a path or pattern that is absolute, a URL, or goes up: it cannot be in the repo."""
    return _OUTSIDE.search(pattern) is not None


def data_request(
    repo: str,
    config: str | None,
    *,
    split: str | None,
    revision: str | None,
    columns: Sequence[str] | None,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    features: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> DataRequest:
    """Check the arguments that name data. Raises UsageError."""
    builder = ""
    if repo in FORMATS and (data_files is not None or data_dir is not None):
        builder = repo
        if (there := _of_the_hub(data_files, data_dir, revision)) is not None:
            repo, revision, data_files = there
        else:
            repo, data_files, data_dir = _of_this_disk(data_files, data_dir)
    if columns is not None and (not columns or isinstance(columns, str)):
        raise UsageError(f"columns must be a list of column names, got {columns!r}")
    if partial and columns is None:
        raise UsageError("partial brings only the ranges of some columns: name them with columns= (--columns a,b)")
    if split is not None:
        parse_split(split)
    ref = repo_ref(repo, revision)
    return DataRequest(
        ref,
        config,
        split,
        None if columns is None else tuple(columns),
        None if data_files is None or (builder and not data_files) else given_data_files(ref, data_files),
        given_data_dir(ref, data_dir),
        None if features is None else given_features(features),
        builder,
        _given_settings({name: value for name, value in (settings or {}).items() if name != VERIFICATION}),
        _checks_rows((settings or {}).get(VERIFICATION)),
        partial and not is_folder(ref.repo_id),  # the files of a folder are read where they lie, and all checked
    )


def _checks_rows(mode: Any) -> bool:
    """What `verification_mode` says, by name or as `datasets`' own. Only `no_checks` leaves anything out."""
    name = str(getattr(mode, "value", mode or "basic_checks"))
    if name not in ("all_checks", "basic_checks", "no_checks"):
        raise UsageError(f"{VERIFICATION} is all_checks, basic_checks or no_checks, got {mode!r}")
    return name != "no_checks"


def _given_settings(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((name, json.dumps(value, sort_keys=True)) for name, value in sorted(settings.items()))
    except (TypeError, ValueError) as error:
        raise UsageError(f"a setting of the reader must be text, a number, or a list of these: {error}") from error


def given_features(features: Mapping[str, Any]) -> str:
    """Check the argument `features`, crucible's or `datasets`' own; as JSON. Raises UsageError."""
    from crucible.feature_classes import plain_features  # imports pyarrow, which `--help` does not need
    from crucible.feature_types import dump_features, schema_of

    plain = plain_features(features)
    try:
        schema_of(plain)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"features: {error}") from error
    return dump_features(plain)


def given_data_files(repo: RepoRef, value: Any) -> Patterns:
    """Check the argument `data_files`. Raises UsageError naming what is wrong with it."""
    return tuple((split, tuple(_inside(repo, one) for one in patterns)) for split, patterns in _splits_of(value))


def _splits_of(value: Any) -> Patterns:
    """`data_files` in any of its forms, each as (split, patterns). Raises UsageError."""
    if not value:
        raise UsageError(f"data_files is empty ({value!r}); leave it out to get what the repo says")
    if isinstance(value, (str, os.PathLike)):
        return (("train", _texts("train", value)),)
    if not isinstance(value, Iterable):
        raise UsageError(f"data_files must be a path, a list of paths, or a dict of split to paths, got {value!r}")
    listed = list(value)
    if isinstance(value, Mapping):
        pairs = [(str(split), patterns) for split, patterns in value.items()]
    elif any(isinstance(one, Mapping) for one in listed):
        if not all(isinstance(one, Mapping) and set(one) == {"split", "path"} for one in listed):
            raise UsageError(f"data_files: each entry of the list needs `split` and `path`, nothing else: {listed!r}")
        pairs = [(str(one["split"]), one["path"]) for one in listed]
    else:
        pairs = [("train", listed)]
    names = [split for split, _ in pairs]
    for split in names:
        if not is_split_name(split):
            raise UsageError(f"data_files: {split!r} is not a split name (letters, digits, _ and . between words)")
        if names.count(split) > 1:
            raise UsageError(f"data_files: split {split!r} is there twice")
    return tuple((split, _texts(split, patterns)) for split, patterns in pairs)


def _texts(split: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(listed, (list, tuple)) or not listed:
        raise UsageError(f"data_files: split {split!r} needs a path or a list of paths, got {value!r}")
    texts = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in listed]
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UsageError(f"a path in data_files must be a string that is not empty, got {text!r}")
    return tuple(texts)


def given_data_dir(repo: RepoRef, value: str | os.PathLike[str] | None) -> str:
    """Check the argument `data_dir`; the folder's path in the repo, empty for the whole repo. Raises UsageError."""
    folder = _inside(repo, os.fspath(value)) if value else ""
    return "/".join(part for part in folder.split("/") if part not in ("", "."))


def _of_the_hub(
    data_files: DataFiles | None, data_dir: str | None, revision: str | None
) -> tuple[str, str | None, DataFiles] | None:
    """(repo, revision, patterns in it) of addresses on the Hub; None for paths. Raises UsageError for several repos."""
    splits = _splits_of(data_files) if data_files is not None and data_dir is None else ()
    found = one_repo((pattern for _, patterns in splits for pattern in patterns), revision)
    if found is None:
        return None
    places = {split: [place for one in patterns if (place := hub_place(one))] for split, patterns in splits}
    return (*found, {split: [place.path for place in many] for split, many in places.items()})


def _of_this_disk(data_files: DataFiles | None, data_dir: str | None) -> tuple[str, DataFiles, str | None]:
    """(folder, patterns relative to it, no data_dir) for files anywhere on this disk: the deepest folder with all."""
    here = os.path.abspath(os.path.expanduser(data_dir or ""))
    if data_files is None:
        return here, {}, None
    splits = [
        (split, [os.path.normpath(os.path.join(here, _local(pattern))) for pattern in patterns])
        for split, patterns in _splits_of(data_files)
    ]
    root = os.path.commonpath([literal_folder(pattern) for _, patterns in splits for pattern in patterns])
    return root, {split: [os.path.relpath(one, root) for one in patterns] for split, patterns in splits}, None


def literal_folder(pattern: str) -> str:
    """The folder that every match of a pattern lies in: its path up to the first part with a wildcard."""
    magic = _MAGIC.search(pattern)
    return os.path.dirname(pattern if magic is None else pattern[: magic.start()])


def _local(pattern: str) -> str:
    if "://" in pattern or "::" in pattern:
        raise UsageError(
            f"{pattern!r} is neither a path on this disk nor an address in a dataset repo (hf://datasets/...); no hash "
            "vouches for files from elsewhere, so download it first"
        )
    return pattern


def _inside(repo: RepoRef, pattern: str) -> str:
    """The pattern relative to the repo's root. Raises UsageError for one that leads elsewhere."""
    given = pattern
    for root in (repo.repo_id, f"hf://datasets/{repo.repo_id}@{repo.revision}", f"hf://datasets/{repo.repo_id}"):
        if pattern == root or pattern.startswith(f"{root}/"):
            pattern = pattern.removeprefix(root).lstrip("/") if is_outside(root) else pattern
            break
    if is_outside(pattern):
        elsewhere = hub_place(given)
        raise UsageError(
            f"{given!r} is outside {repo.repo_id}; give a path or a pattern relative to the repo. "
            + (
                f"To read files of another repo, load {elsewhere.repo!r}, or name their format in place of a repo: "
                f"load_dataset('csv', data_files={given!r})"
                if elsewhere is not None
                else "Files from elsewhere (URLs) are not read: no hash vouches for them; download them, and load that"
            )
        )
    return pattern
