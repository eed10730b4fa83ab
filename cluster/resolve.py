"""From a pinned repo's tree listing and its card to configs, splits and files. Pure; exactly what `datasets` 5.2 gives.

The card's `configs:` decide where there are any; else the conventions on names do (`patterns.DEFAULT_PATTERNS`). One
builder serves all configs: the one that the most common extension of the first config asks for.

A request may name files itself (`data_files`, `data_dir`). They take the place of what the card or the conventions say
in every config, whose settings stay; what `dataset_info` declares is about other files then, and does not count.

A config that cannot be used (a file it names is missing, its format has no reader yet) does not spoil the others:
the reason stays with it and `choose` raises it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crucible.card import Card, CardConfig, CardInfo, parse_card
from crucible.cluster.builders import DATA_EXTENSIONS, READABLE, Builder, infer_builder, infer_inside, keep_files_of
from crucible.cluster.patterns import BadPattern, Listing
from crucible.data_files import Patterns, is_outside
from crucible.errors import (
    ConfigNotFound,
    ConfigRequired,
    CrucibleError,
    InvalidCard,
    NoDataFiles,
    ScriptRepo,
    SplitNotFound,
    UnsafePath,
    UnsupportedFormat,
    UsageError,
)
from crucible.feature_types import Feature, dump_features
from crucible.formats.folders import FOLDERS
from crucible.refs import ReadOptions, RepoRef, SourceFile, safe_repo_path
from crucible.splits import split_names

NamesIn = Callable[[SourceFile], Sequence[str]]

CONVERT_REF = "refs/convert/parquet"
"""Where the Hub keeps its own parquet copy of a repo."""

_USED_PARAMS = {
    "csv": (
        "sep delimiter header names column_names skiprows quotechar escapechar doublequote quoting skipinitialspace "
        "na_values keep_default_na na_filter true_values false_values skip_blank_lines thousands decimal encoding "
        "encoding_errors usecols on_bad_lines comment index_col lineterminator nrows skipfooter"
    ),
    "json": "field encoding encoding_errors on_mixed_types",
    "text": "encoding encoding_errors keep_linebreaks sample_by",
    "parquet": "columns filters",
    "arrow": "",
    **dict.fromkeys(FOLDERS, "drop_labels drop_metadata metadata_filenames"),
}
"""Settings of a builder that change the rows. Others of the card's keys are ignored, as `datasets` ignores them."""


@dataclass(frozen=True, slots=True)
class ResolvedSplit:
    name: str
    files: tuple[SourceFile, ...]
    """In the order their rows come."""
    options: ReadOptions
    declared_rows: int | None
    """`num_examples` of the card, to check the rows against."""


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    name: str
    splits: tuple[ResolvedSplit, ...]
    default: bool
    problem: CrucibleError | None = None
    """Why this config cannot be used; `choose` raises it."""
    declared: frozenset[str] = frozenset()
    """Splits that the card declares the rows of; empty where it does not."""


def resolve(
    repo: RepoRef,
    files: Iterable[SourceFile],
    card: str | None,
    *,
    refs: Sequence[str] = (),
    extra_yaml: str | None = None,
    legacy_infos: str | None = None,
    data_files: Patterns | None = None,
    data_dir: str = "",
    names_in: NamesIn | None = None,
) -> tuple[ResolvedConfig, ...]:
    """All configs of a repo, in the card's order.

    `files` is the whole recursive listing, `card` the text of README.md, `extra_yaml` that of `.huggingface.yaml`,
    `legacy_infos` that of `dataset_infos.json`; `refs` are the repo's refs (they only improve ScriptRepo's advice).
    `data_files` and `data_dir` are the request's. `names_in` lists an archive: without it nobody reads zip archives.
    Raises ScriptRepo, InvalidCard, NoDataFiles and UnsupportedFormat.
    """
    listing = Listing(files)
    script = f"{repo.repo_id.rpartition('/')[2]}.py"
    if script in listing.by_path:
        raise ScriptRepo(repo.repo_id, script, CONVERT_REF if CONVERT_REF in refs else "")
    parsed = parse_card(repo.repo_id, card, extra_yaml, legacy_infos)
    default = parsed.default_config(repo.repo_id)
    if data_files is not None or data_dir:
        return _with_request(repo, listing, parsed, default, data_files, data_dir, names_in)
    builder, splits = _infer(repo, listing, parsed, names_in)
    if not parsed.configs:
        kept = tuple((name, keep_files_of(builder.name, found)) for name, found in splits)
        return (_without_configs(repo, parsed, builder, kept, default in (None, "default")),)
    return tuple(
        _with_config(repo, listing, parsed, builder, config, config.name == default) for config in parsed.configs
    )


_Splits = tuple[tuple[str, tuple[SourceFile, ...]], ...]


def _with_request(
    repo: RepoRef,
    listing: Listing,
    card: Card,
    default: str | None,
    data_files: Patterns | None,
    data_dir: str,
    names_in: NamesIn | None,
) -> tuple[ResolvedConfig, ...]:
    """The same files for every config; for none in particular too, where the card has several and no default."""
    base = _clean(data_dir)
    patterns = _default_patterns(repo, listing, base) if data_files is None else data_files
    builder, splits = _builder_of(repo, _select(repo, listing, patterns, base, by="data_files"), names_in)
    if data_dir:
        splits = tuple((name, keep_files_of(builder.name, found)) for name, found in splits)
    else:  # a file that was asked for by name is read, whatever its own extension
        splits = _select(repo, listing, patterns, base, extensions=None, by="data_files")
    problem = _problem(repo, builder, splits)
    configs = card.configs or (CardConfig("default", None, "", default in (None, "default"), {}),)
    if default is None and len(configs) > 1:
        configs += (CardConfig("default", None, "", True, {}),)
        default = "default"
    return tuple(
        _resolved(
            config.name,
            config.name == default or config.default,
            builder,
            splits,
            config.params,
            config.features,
            None,
            problem,
        )
        for config in configs
    )


def resolve_files(
    repo: RepoRef, files: Iterable[SourceFile], builder: str, name: str | None, data_files: Patterns | None
) -> tuple[ResolvedConfig, ...]:
    """The one config, called `name` or `default`, of files that are no repo and are read as `builder` says."""
    listing = Listing(files)
    patterns = _default_patterns(repo, listing, "") if data_files is None else data_files
    made = Builder(builder)
    splits = _select(repo, listing, patterns, "", extensions=None, by="data_files")
    problem = _problem(repo, made, splits)
    return (_resolved(name or "default", True, made, splits, {}, None, None, problem),)


def _infer(repo: RepoRef, listing: Listing, card: Card, names_in: NamesIn | None) -> tuple[Builder, _Splits]:
    """The builder of the whole repo, and the splits it was seen in: the first config's, looked up from the root."""
    first = card.configs[0] if card.configs else None
    patterns = first.data_files if first is not None else None
    if patterns is None:
        patterns = _default_patterns(repo, listing, "")
    return _builder_of(repo, _select(repo, listing, patterns, ""), names_in)


def _look(builder: Builder | None, files: tuple[SourceFile, ...], names_in: NamesIn | None) -> Builder | None:
    """The builder, or where files are archives that of what they hold."""
    if builder is None or builder.name != "zip" or names_in is None:
        return builder
    return infer_inside(files, names_in)


def _builder_of(repo: RepoRef, splits: _Splits, names_in: NamesIn | None) -> tuple[Builder, _Splits]:
    builders = {name: _look(infer_builder(found), found, names_in) for name, found in splits}
    distinct = set(builders.values())
    if len(distinct) > 1:
        said = ", ".join(f"{name}: {made.name if made else 'nothing'}" for name, made in builders.items())
        raise UnsupportedFormat(f"{repo.repo_id}: splits of different formats ({said})", READABLE)
    builder = next(iter(distinct), None)
    if builder is None:
        raise NoDataFiles(repo.repo_id, "no file has an extension of a known format")
    return builder, splits


def _default_patterns(repo: RepoRef, listing: Listing, base: str) -> Patterns:
    try:
        patterns = listing.default_patterns(base)
    except ValueError as error:
        raise NoDataFiles(repo.repo_id, str(error)) from error
    if patterns is None:
        raise NoDataFiles(repo.repo_id, f"nothing in {base}" if base else "the repo has no files that could be data")
    return tuple(patterns.items())


def _select(
    repo: RepoRef,
    listing: Listing,
    patterns: Patterns,
    base: str,
    *,
    extensions: Collection[str] | None = DATA_EXTENSIONS,
    by: str = "the card",
) -> _Splits:
    """The files of each split. `by` says who named the patterns, for errors."""

    def wrong(why: str) -> CrucibleError:
        return InvalidCard(repo.repo_id, "README.md", why) if by == "the card" else UsageError(f"{by}: {why}")

    for pattern in (one for _, many in patterns for one in many):
        if is_outside(pattern):
            raise wrong(f"data file {pattern!r} is outside this repo")
    try:
        return tuple((split, listing.select(many, base, extensions)) for split, many in patterns)
    except FileNotFoundError as error:
        raise NoDataFiles(repo.repo_id, f"{by} names {error}, which is not there as a data file") from error
    except BadPattern as error:
        raise wrong(str(error)) from error


def _without_configs(repo: RepoRef, card: Card, builder: Builder, splits: _Splits, default: bool) -> ResolvedConfig:
    """The single config `default`. Beside a lone `dataset_info` of another name it has to be asked for by name."""
    info = card.infos.get("default")
    return _resolved("default", default, builder, splits, {}, None, info, _problem(repo, builder, splits))


def _with_config(
    repo: RepoRef, listing: Listing, card: Card, builder: Builder, config: CardConfig, default: bool
) -> ResolvedConfig:
    base = config.data_dir
    try:
        if is_outside(base):
            raise InvalidCard(repo.repo_id, "README.md", f"data_dir {base!r} is outside this repo")
        base = _clean(base)
        patterns = config.data_files
        if patterns is None:
            patterns = _default_patterns(repo, listing, base)
        splits = _select(repo, listing, patterns, base)
        problem = _problem(repo, builder, splits)
    except CrucibleError as error:
        splits, problem = (), error
    return _resolved(
        config.name,
        default,
        builder,
        splits,
        config.params,
        config.features,
        card.infos.get(config.name),
        problem,
    )


def _clean(folder: str) -> str:
    return "/".join(part for part in folder.split("/") if part not in ("", "."))


def _problem(repo: RepoRef, builder: Builder, splits: _Splits) -> CrucibleError | None:
    if builder.name not in READABLE:
        return UnsupportedFormat(f"{repo.repo_id} ({builder.name})", READABLE)
    if not any(found for _, found in splits):
        return NoDataFiles(repo.repo_id, "no file matches the patterns that say which files are data")
    for path in (file.path for _, found in splits for file in found):
        try:
            safe_repo_path(repo.repo_id, path)
        except UnsafePath as error:
            return error
    return None


def _resolved(
    name: str,
    default: bool,
    builder: Builder,
    splits: _Splits,
    params: Mapping[str, Any],
    features: dict[str, Feature] | None,
    info: CardInfo | None,
    problem: CrucibleError | None,
) -> ResolvedConfig:
    options = _options(builder, params, _declared(builder.name, features, info))
    rows = info.rows if info is not None else {}
    return ResolvedConfig(
        name,
        tuple(ResolvedSplit(split, found, options, rows.get(split)) for split, found in splits),
        default,
        problem,
        frozenset(rows),
    )


def _declared(builder: str, features: dict[str, Feature] | None, info: CardInfo | None) -> dict[str, Feature] | None:
    """The features that win: those of `dataset_info`, else the config's own.

    With an entry in `dataset_info` that has no features, `datasets` drops the config's for parquet, json and arrow, and
    so does this; csv and text read by the config's in any case.
    """
    if builder in FOLDERS:
        return features  # `datasets` writes what it found over what `dataset_info` says
    if info is None or builder in ("csv", "text"):
        return info.features if info is not None and info.features is not None else features
    return info.features


def _options(builder: Builder, params: Mapping[str, Any], features: dict[str, Feature] | None) -> ReadOptions:
    used = _USED_PARAMS.get(builder.name, "").split()
    merged = dict(builder.params)
    for key, value in params.items():
        if key in used and value is not None:
            merged[key] = json.dumps(value, sort_keys=True, default=str)
    return ReadOptions(
        builder=builder.name,
        params=tuple(sorted(merged.items())),
        features=None if features is None else dump_features(features),
    )


def with_settings(options: ReadOptions, settings: Mapping[str, Any]) -> ReadOptions:
    """`options` with settings that a caller gives. Raises UsageError for one that this format does not have."""
    known = [name for name in _USED_PARAMS.get(options.builder, "").split() if name != "columns"]
    for name in settings:
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{name}= is no argument, and no setting of {options.builder} files; {there}")
    given = {name: json.dumps(value, sort_keys=True) for name, value in settings.items() if value is not None}
    return replace(options, params=tuple(sorted({**dict(options.params), **given}.items())))


def check_splits(repo: RepoRef, config: ResolvedConfig) -> None:
    """Raise InvalidCard where `dataset_info` has other splits than the files, as `datasets` does."""
    names = {split.name for split in config.splits}
    if config.declared and config.declared != names:
        raise InvalidCard(
            repo.repo_id,
            "README.md",
            f"config {config.name!r}: `dataset_info` declares the splits {', '.join(sorted(config.declared))}, "
            f"the files give {', '.join(sorted(names))}; if the card is out of date, load it with "
            "verification_mode='no_checks'",
        )


def choose(
    repo: RepoRef, configs: Sequence[ResolvedConfig], config: str | None, split: str | None
) -> tuple[ResolvedConfig, tuple[ResolvedSplit, ...]]:
    """The config and splits a request means: None is the default config, and all splits; else a split expression.

    Raises ConfigRequired, ConfigNotFound or SplitNotFound, which name what there is, or the config's own problem.
    """
    names = [one.name for one in configs]
    if config is None:
        chosen = next((one for one in configs if one.default), None)
        if chosen is None:
            raise ConfigRequired(repo.repo_id, names)
    else:
        found = [one for one in configs if one.name == config]
        if not found:
            raise ConfigNotFound(repo.repo_id, config, names)
        chosen = found[0]
    if chosen.problem is not None:
        raise chosen.problem
    if split is None:
        return chosen, chosen.splits
    known = {one.name: one for one in chosen.splits}
    wanted = split_names(split, tuple(known))
    for name in wanted:
        if name not in known:
            raise SplitNotFound(repo.repo_id, chosen.name, name, list(known))
    return chosen, tuple(known[name] for name in wanted)
