"""From a request to what must be done: ask the Hub, resolve, cut into items; or find that all is here. Does the I/O of
resolution, so that `resolve`, `plan` and `place` need none. Runs in the coordinator, or in a process without Ray.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crucible.cache.hubcache import HubCache
from crucible.cache.store import Store
from crucible.cluster.media import look_inside, plan_splits
from crucible.cluster.patterns import BadPattern, Listing, has_magic
from crucible.cluster.resolve import (
    ResolvedConfig,
    ResolvedSplit,
    check_splits,
    choose,
    resolve,
    resolve_files,
    with_settings,
)
from crucible.config import Settings
from crucible.data_files import Patterns, literal_folder
from crucible.errors import CorruptFile, ManifestError, OfflineMode, ScriptRepo, SourceUnavailable, UsageError
from crucible.feature_types import dump_features, parse_features
from crucible.formats.footer import ParquetFooter, footer_tail, parse_footer
from crucible.hub.cached import CachedRepo
from crucible.hub.client import Repo, is_folder, open_repo
from crucible.hub.governor import Governor
from crucible.manifest import Manifest
from crucible.refs import ByteRange, DataRequest, ReadOptions, RepoRef, SourceFile, WorkItem, is_full_sha
from crucible.report import Tally

FOOTERS_AT_ONCE = 16
"""Each is a round trip or two, and little else."""
_log = logging.getLogger(__name__)
METADATA_FILES = ("README.md", ".huggingface.yaml", "dataset_infos.json")


@dataclass(frozen=True)
class Prepared:
    """A request, pinned and resolved. The store had everything if `manifests` is full; else `items` say what to do."""

    request: DataRequest
    repo: RepoRef
    """Pinned."""
    config: str
    splits: tuple[ResolvedSplit, ...]
    items: tuple[Sequence[WorkItem], ...]
    """The work items of each split."""
    manifests: tuple[Manifest, ...]
    survey: Mapping[str, Any]
    """Configs and splits of the repo, as `Store.put_survey` keeps them."""

    @property
    def cached(self) -> bool:
        return bool(self.manifests)

    @property
    def revisions(self) -> tuple[str, ...]:
        return (self.request.repo.revision,)


def prepare(
    request: DataRequest,
    settings: Settings,
    store: Store,
    tally: Tally,
    *,
    again: bool = False,
    governor: Governor | None = None,
    commit: str = "",
    reading: bool = False,
) -> Prepared:
    """Pin, list and resolve. One request when the store has the commit's manifests, none when the revision is a commit.

    Offline, what the store does not have is resolved from the Hub cache, if a whole repo was pulled there.
    `commit` is where the revision was pinned to before, by a job that now goes on: it may point elsewhere by now.
    `again`: the manifests are known, but shards of them are gone and must be re-made. Their own recipes say how.
    `reading`: a revision that the Hub cannot be asked about is the commit that the store last heard it was, if any.
    Raises a RepoError, OfflineMode, or a TransferError when the Hub cannot be asked.
    """
    if settings.offline and not is_folder(request.repo.repo_id):
        try:
            return _again(_offline(request, store)) if again else _offline(request, store)
        except OfflineMode:
            if not CachedRepo(HubCache(settings.hub_cache)).knows(request.repo):
                raise
    only = None if not request.builder or request.data_files is None else _named(request.data_files)
    with open_repo(request.repo, settings, tally, governor, only) as repo:
        known = is_full_sha(commit) and not is_folder(request.repo.repo_id)
        try:
            pinned = replace(request.repo, revision=commit) if known else repo.pin(request.repo)
        except SourceUnavailable as error:
            if not reading or (last := _last_heard(request, store)) is None:
                raise
            _log.warning("%s; reading commit %s, which it last was here", error, last.repo.revision[:12])
            return last
        if (warm := _from_store(request, pinned, store)) is not None:
            return _again(warm) if again else warm
        configs = survey_repo(repo, pinned, request)
        config, splits = choose(pinned, configs, request.config, request.split)
        if request.check_rows:
            check_splits(pinned, config)
        splits = tuple(replace(split, options=_options(split.options, request)) for split in splits)
        splits, items = plan_splits(repo, pinned, config.splits, splits, settings, store)
    return Prepared(request, pinned, config.name, splits, items, (), _describe(pinned, configs, request))


def _options(options: ReadOptions, request: DataRequest) -> ReadOptions:
    features = options.features if request.features is None else request.features
    options = with_settings(options, {name: json.loads(value) for name, value in request.settings})
    if request.partial and (options.builder != "parquet" or options.param("filters") is not None):
        what = "read by filters" if options.builder == "parquet" else f"of {options.builder} files"
        raise UsageError(
            f"{request.repo.repo_id} is {what}: only of plain parquet can a column come without the others; "
            "leave out partial (--partial)"
        )
    if request.columns is not None:  # before those of the card
        options = replace(options, params=tuple(one for one in options.params if one[0] != "columns"))
    listed = options.param("columns")
    if listed is not None and features is not None:
        features = dump_features({name: one for name, one in parse_features(features).items() if name in listed})
    return replace(options, columns=request.columns, features=features, partial=request.partial)


def survey_repo(repo: Repo, pinned: RepoRef, request: DataRequest | None = None) -> tuple[ResolvedConfig, ...]:
    """List a pinned repo once, read its few metadata files, and resolve its configs; with the files `request` names."""
    files = list(repo.files(pinned))
    if request is not None and request.builder:
        return resolve_files(pinned, files, request.builder, request.config, request.data_files)
    texts = {
        file.path: repo.read(pinned, file).decode("utf-8", "replace") for file in files if file.path in METADATA_FILES
    }
    card, extra, infos = (texts.get(path) for path in METADATA_FILES)
    try:
        return resolve(
            pinned,
            files,
            card,
            extra_yaml=extra,
            legacy_infos=infos,
            data_files=None if request is None else request.data_files,
            data_dir="" if request is None else request.data_dir,
            names_in=look_inside(repo, pinned),
        )
    except ScriptRepo:  # only now is it worth a request to see whether the Hub has a parquet copy to recommend
        return resolve(pinned, files, card, refs=repo.revisions(pinned))


def _named(data_files: Patterns) -> Callable[[Path], Iterator[str]]:
    """What of a folder these patterns can mean: only that is looked at, links followed as the caller named it."""
    patterns = [pattern for _, many in data_files for pattern in many]

    def paths(folder: Path) -> Iterator[str]:
        seen: set[str] = set()
        for pattern in patterns:
            if not has_magic(pattern):
                seen.add(pattern)
                continue
            for root, folders, names in os.walk(folder / literal_folder(pattern)):
                folders.sort()
                seen.update(Path(root, name).relative_to(folder).as_posix() for name in names)
        there = [SourceFile(path, 0, "", False) for path in seen if (folder / path).is_file()]
        listing, found = Listing(there), set[str]()
        for pattern in patterns:
            with suppress(BadPattern):  # resolution says what is wrong with it
                found.update(file.path for file in listing.glob(pattern))
        yield from sorted(found)

    return paths


def footers(repo: Repo, pinned: RepoRef, files: tuple[SourceFile, ...]) -> dict[str, ParquetFooter]:
    """path -> footer of every parquet file, read by range: row counts and sizes before the data moves."""

    def footer(file: SourceFile) -> ParquetFooter:
        wanted: ByteRange | ParquetFooter = footer_tail(file.size)
        for _ in range(3):
            assert isinstance(wanted, ByteRange)
            wanted = parse_footer(file.path, file.size, repo.read(pinned, file, wanted))
            if isinstance(wanted, ParquetFooter):
                return wanted
        raise CorruptFile(file.path, "its end", "the parquet footer never fits its own length")

    if len(files) < 2:
        return {file.path: footer(file) for file in files}
    with ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="crucible-footer") as pool:
        return dict(zip([file.path for file in files], pool.map(footer, files), strict=True))


def _describe(pinned: RepoRef, configs: tuple[ResolvedConfig, ...], request: DataRequest) -> dict[str, Any]:
    return {
        "variant": request.variant,
        "commit": pinned.revision,
        "configs": {config.name: [split.name for split in config.splits] for config in configs},
        "default": next((config.name for config in configs if config.default), None),
    }


def _from_store(request: DataRequest, pinned: RepoRef, store: Store, *, offline: bool = False) -> Prepared | None:
    """The request from manifests that are here, or None when one is missing, or not to be trusted.

    `offline` raises ManifestError for one that cannot be trusted: nobody can be asked for a better one.
    """
    survey = store.get_survey(pinned, request.variant)
    found = None if survey is None else _known(request, pinned, store, survey)
    if survey is None or found is None:
        return None
    config, ids = found
    try:
        manifests = tuple(store.get_manifest(manifest_id) for manifest_id in ids.values())
    except ManifestError as error:  # of another format, altered, or not brought by whom the lock file is from
        if offline:
            raise
        if not request.locked:
            _log.warning("%s; asking the Hub again", error)
        return None
    if old := next((one for one in manifests if not one.current), None):
        problem = f"{old.split} of {old.repo} was converted by another version of crucible than this one"
        if offline:
            raise ManifestError(old.id[:12], f"{problem}; prefetch it anew where the Hub can be asked")
        _log.warning("%s; it is made again", problem)
        return None
    return Prepared(request, pinned, config.name, (), (), manifests, survey)


def _again(warm: Prepared) -> Prepared:
    """What must be done to have the manifests' shards again, as the manifests say."""
    splits = tuple(
        ResolvedSplit(
            manifest.split,
            tuple(file for item in manifest.items for file in item.files),
            manifest.items[0].options if manifest.items else ReadOptions("remembered"),
            None,
        )
        for manifest in warm.manifests
    )
    return replace(warm, splits=splits, items=tuple(one.items for one in warm.manifests), manifests=())


def _known(
    request: DataRequest, pinned: RepoRef, store: Store, survey: Mapping[str, Any]
) -> tuple[ResolvedConfig, dict[str, str]] | None:
    """(config, split -> manifest id) of a request, or None when the store does not know all of it."""
    try:
        known = tuple(
            ResolvedConfig(name, tuple(_split_name(split) for split in splits), name == survey["default"])
            for name, splits in survey["configs"].items()
        )
    except (KeyError, TypeError, AttributeError):
        return None  # written by something else: resolve again
    config, splits = choose(pinned, known, request.config, request.split)
    ids = store.find_manifests(pinned, config.name, request.columns, request.variant)
    ids.update((split, manifest) for split, manifest, _ in request.locked)
    if any(split.name not in ids for split in splits):
        return None
    return config, {split.name: ids[split.name] for split in splits}


def _split_name(name: str) -> ResolvedSplit:
    return ResolvedSplit(name, (), ReadOptions("remembered"), None)


def _offline(request: DataRequest, store: Store) -> Prepared:
    survey = store.get_survey(request.repo, request.variant)
    if survey is None:
        raise OfflineMode(str(request.repo))
    pinned = replace(request.repo, revision=str(survey["commit"]))
    prepared = _from_store(request, pinned, store, offline=True)
    if prepared is None:
        raise OfflineMode(f"{request.repo}, config {request.config or 'default'}, split {request.split or 'all'}")
    return prepared


def _last_heard(request: DataRequest, store: Store) -> Prepared | None:
    """What the revision was when this node was last told; None where it never was, or has not all of it."""
    survey = store.get_survey(request.repo, request.variant)
    if survey is None:
        return None
    return _from_store(request, replace(request.repo, revision=str(survey.get("commit"))), store)


def known_manifests(request: DataRequest, store: Store) -> dict[str, str] | None:
    """Split -> manifest id of what a store knows of a request; None if it does not know all of it. Asks nobody.

    Reads no manifest, which may be big. Raises what `choose` does.
    """
    survey = store.get_survey(request.repo, request.variant)
    if survey is None or "commit" not in survey:
        return None
    found = _known(request, replace(request.repo, revision=str(survey["commit"])), store, survey)
    return None if found is None else found[1]


def remember(prepared: Prepared, manifests: tuple[Manifest, ...], store: Store) -> None:
    """Keep a job's manifests, and let the commit and the revision that was asked for point to them."""
    for manifest in manifests:
        store.put_manifest(manifest, prepared.revisions)
    commit = prepared.repo
    for ref in {commit, *(replace(commit, revision=name) for name in prepared.revisions)}:
        store.put_survey(ref, dict(prepared.survey))
