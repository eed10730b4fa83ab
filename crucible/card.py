"""What a dataset card (README.md) says about configs and features. Pure: text in, frozen objects out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from crucible.errors import InvalidCard
from crucible.feature_types import Feature, features_from_yaml, normalise
from crucible.printable import printable
from crucible.splits import is_split_name

CARD = "README.md"

MOST_CHARACTERS = 8 << 20
"""Of a card's YAML: it is read with 100 kB a second."""
MOST_NODES = 1_000_000
"""Values in it, with what its aliases stand for."""
_BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")


@dataclass(frozen=True, slots=True)
class CardConfig:
    """One entry of `configs:`."""

    name: str
    data_files: tuple[tuple[str, tuple[str, ...]], ...] | None
    """(split, patterns) in the card's order; None when the conventions on names decide."""
    data_dir: str
    default: bool
    params: Mapping[str, Any]
    """The rest: settings of the builder."""
    features: dict[str, Feature] | None = None


@dataclass(frozen=True, slots=True)
class CardInfo:
    """One entry of `dataset_info:`."""

    features: dict[str, Feature] | None
    rows: Mapping[str, int]
    """Split -> declared number of rows."""


@dataclass(frozen=True, slots=True)
class Card:
    configs: tuple[CardConfig, ...] = ()
    infos: Mapping[str, CardInfo] = field(default_factory=dict)

    def default_config(self, repo: str) -> str | None:
        """The only config, the one named `default` or marked so, or else the one a lone `dataset_info` names.

        Raises InvalidCard for two that are marked.
        """
        marked = [c.name for c in self.configs if len(self.configs) == 1 or c.name == "default" or c.default]
        if len(marked) > 1:
            raise InvalidCard(repo, CARD, f"configs {marked[0]!r} and {marked[1]!r} are both the default")
        if not marked and len(self.infos) == 1:
            return next(iter(self.infos))
        return marked[0] if marked else None


def parse_card(repo: str, text: str | None, extra: str | None = None, legacy: str | None = None) -> Card:
    """Read a card. Raises InvalidCard.

    `extra` is the text of `.huggingface.yaml`, whose keys override the card's; `legacy` that of `dataset_infos.json`,
    which says what the card does not.
    """
    data = _yaml_of(repo, text or "")
    if extra is not None:
        data = {**data, **_load(repo, extra, ".huggingface.yaml")}
    infos = {**_legacy_infos(repo, legacy or "{}"), **_infos(repo, data.get("dataset_info"))}
    return Card(configs=_configs(repo, data.get("configs")), infos=infos)


def _yaml_of(repo: str, text: str) -> dict[str, Any]:
    match = _BLOCK.search(text.removeprefix("\ufeff"))
    return _load(repo, match[2], CARD) if match else {}


def _load(repo: str, block: str, path: str) -> dict[str, Any]:
    try:
        data = load_yaml(block)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" in line {mark.line + 2}" if mark is not None else ""
        raise InvalidCard(repo, path, f"the YAML{at} cannot be read: {getattr(error, 'problem', error)}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidCard(repo, path, f"the YAML cannot be read: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InvalidCard(repo, path, "the YAML at the top is not a set of keys")
    return data


def load_yaml(block: str) -> Any:
    """What YAML says, if it is of a bounded size with all its aliases written out. Raises YAMLError or ValueError.

    An alias costs nothing until somebody walks over it: thirty lines can stand for more nodes than there is memory.
    """
    if len(block) > MOST_CHARACTERS:
        raise ValueError(f"{len(block):,} characters, at most {MOST_CHARACTERS:,} are read")
    loader = yaml.SafeLoader(block)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if (size := _size(root, {})) > MOST_NODES:
            raise ValueError(f"its aliases stand for {size:,} values, at most {MOST_NODES:,} are read")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a tree whose aliases are all written out. Raises ValueError for one that contains itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias in it stands for what contains it")
        return known[id(node)]
    known[id(node)] = 0
    parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    known[id(node)] = size = 1 + sum(_size(part, known) for part in parts)
    return size


def _configs(repo: str, listed: Any) -> tuple[CardConfig, ...]:
    if not listed:
        return ()
    if not isinstance(listed, list):
        raise InvalidCard(repo, CARD, "`configs` must be a list")
    entries: dict[str, dict[str, Any]] = {}
    for entry in listed:
        if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
            raise InvalidCard(repo, CARD, f"each of `configs` needs a `config_name` that is a string, got {entry!r}")
        name = entry["config_name"]
        if not name or name != printable(name) or any(char in name for char in r"<>:/\|?*"):
            raise InvalidCard(repo, CARD, f"{name!r} cannot be a config's name")
        entries[name] = entry  # the last of two with one name counts, as in `datasets`, whatever the first one says
    return tuple(_config(repo, name, entry) for name, entry in entries.items())


def _config(repo: str, name: str, entry: dict[str, Any]) -> CardConfig:
    known = ("config_name", "data_files", "data_dir", "default", "features")
    data_dir = entry.get("data_dir")
    if data_dir is not None and not isinstance(data_dir, str):
        raise InvalidCard(repo, CARD, f"config {name!r}: `data_dir` must be a folder, got {data_dir!r}")
    features = entry.get("features")
    return CardConfig(
        name=name,
        data_files=_data_files(repo, name, entry.get("data_files")),
        data_dir=data_dir or "",
        default=bool(entry.get("default")),
        params={key: value for key, value in entry.items() if key not in known},
        features=None if features is None else _features(repo, name, features),
    )


def _data_files(repo: str, name: str, value: Any) -> tuple[tuple[str, tuple[str, ...]], ...] | None:
    """`data_files` in its three forms, each as (split, patterns)."""
    if value is None:
        return None
    problem = InvalidCard(
        repo, CARD, f"config {name!r}: `data_files` must be a path, a list of paths, or a list of {{split, path}}"
    )
    if isinstance(value, str):
        return (("train", (value,)),)
    if not isinstance(value, list):
        raise problem
    if all(isinstance(item, str) for item in value):
        return (("train", tuple(value)),)
    splits: dict[str, tuple[str, ...]] = {}
    for item in value:
        if not isinstance(item, dict) or set(item) != {"split", "path"} or not isinstance(item["split"], str):
            raise problem
        split, path = item["split"], item["path"]
        paths = path if isinstance(path, list) else [path]
        if not all(isinstance(one, str) for one in paths):
            raise problem
        if not is_split_name(split):
            raise InvalidCard(repo, CARD, f"config {name!r}: {split!r} is not a split name (letters, digits, _ and .)")
        if split in splits:
            raise InvalidCard(repo, CARD, f"config {name!r}: split {split!r} is there twice")
        splits[split] = tuple(paths)
    return tuple(splits.items())


def _infos(repo: str, listed: Any) -> dict[str, CardInfo]:
    """`dataset_info` by config; an entry without a name is `default`."""
    if isinstance(listed, dict):
        listed = [listed]
    if not isinstance(listed, list):
        return {}
    infos = {}
    for entry in listed:
        if not isinstance(entry, dict):
            raise InvalidCard(repo, CARD, f"each `dataset_info` must be a set of keys, got {entry!r}")
        name = str(entry.get("config_name", "default"))
        features = entry.get("features")
        infos[name] = CardInfo(
            features=None if features is None else _features(repo, name, features),
            rows=_rows(entry.get("splits")),
        )
    return infos


def _legacy_infos(repo: str, text: str) -> dict[str, CardInfo]:
    """`dataset_infos.json` of old versions of push_to_hub: config -> info. A lone one is `default`."""
    path = "dataset_infos.json"
    try:
        listed = json.loads(text)
        infos = {
            str(name): CardInfo(
                features=normalise(info["features"]) if info.get("features") is not None else None,
                rows=_rows([{"name": split, **said} for split, said in (info.get("splits") or {}).items()]),
            )
            for name, info in listed.items()
        }
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise InvalidCard(repo, path, f"cannot be read: {error!r}") from error
    return {"default": next(iter(infos.values()))} if len(infos) == 1 else infos


def _rows(splits: Any) -> dict[str, int]:
    """Declared rows of each split. What is not a number of rows declares nothing."""
    if not isinstance(splits, list):
        return {}
    return {
        str(split.get("name")): split["num_examples"]
        for split in splits
        if isinstance(split, dict) and isinstance(split.get("num_examples"), int) and split["num_examples"] >= 0
    }


def _features(repo: str, config: str, listed: Any) -> dict[str, Feature]:
    try:
        return features_from_yaml(listed)
    except ValueError as error:
        raise InvalidCard(repo, CARD, f"config {config!r}: {error}") from error
