"""Generated repos, cards and arguments: configs, splits, files and declared features equal `datasets` 5.2."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from crucible.card import parse_card
from crucible.cluster.builders import READABLE
from crucible.cluster.resolve import ResolvedConfig, choose, resolve
from crucible.data_files import data_request
from crucible.errors import CrucibleError, UnsupportedFormat
from crucible.refs import RepoRef, SourceFile
from tests.cluster.resolve_cases import lay_out
from tests.oracle import datasets

FOLDERS = [
    "data",
    "train",
    "test",
    "my-train",
    "dev_1",
    "en",
    "en/x",
    ".hid",
    "__s__",
    "a.csv.d",
    "valid",
    "x__y",
    "test.old",
    "data/train",
    "training-0",
]
STEMS = [
    "train",
    "test",
    "val",
    "data",
    "trainer",
    "latest",
    "testing_1",
    "train-test",
    "TRAIN",
    "0",
    "10",
    "2",
    "eval.1",
    "my_dev",
    "_",
    "train-00000-of-00002",
    "train-00001-of-00002",
    "a.b-00000-of-00001",
    "zoo-00000-of-00001-ab",
    "metadata",
    "config",
    "dataset_info",
    ".hidden",
    "__x__",
    "é",
]
ENDS = (
    *[".csv"] * 6,
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".txt",
    ".tsv",
    ".parquet",
    ".weird",
    "",
    ".csv.old",
    ".CSV",
    ".md",
)

PATHS = st.lists(
    st.builds(
        lambda folder, stem, end: "/".join([*folder, stem + end]),
        st.one_of(st.just([]), st.lists(st.sampled_from(FOLDERS), min_size=1, max_size=2)),
        st.sampled_from(STEMS),
        st.sampled_from(ENDS),
    ),
    min_size=1,
    max_size=9,
    unique=True,
)
PATTERNS = st.one_of(
    st.sampled_from(
        [
            "*",
            "**",
            "*.csv",
            "**/*.csv",
            "data/*",
            "en/**",
            "en/*",
            "train*",
            "*/*.csv",
            "[0-9]*.csv",
            "?.csv",
            "*/train/*",
            ".hid/*",
            "__s__/*",
            "data/**/*.csv",
            "./data/*",
            "nope*.csv",
            "nope.csv",
            "data",
            "data/",
            "**/train*",
            "*.jsonl*",
            "*/*/*",
        ]
    ),
    st.builds("{}{}".format, st.sampled_from(STEMS), st.sampled_from([".csv", ".jsonl", "*", ".*"])),
    st.builds("{}/{}.csv".format, st.sampled_from(FOLDERS), st.sampled_from(STEMS)),
)
SPLITS = st.sampled_from(["train", "test", "validation", "zoo", "a.b", "x_1"])
MANY = st.one_of(PATTERNS, st.lists(PATTERNS, min_size=1, max_size=3))
FOLDER = st.sampled_from([*FOLDERS, "en/", "./data", "nope"])
FEATURES = st.sampled_from(
    [
        [{"name": "a", "dtype": "int8"}, {"name": "b", "dtype": "string"}],
        [{"name": "a", "dtype": {"class_label": {"names": {"0": "x", "1": "y"}}}}],
        [{"name": "a", "list": "int32"}, {"name": "b", "struct": [{"name": "c", "dtype": "bool"}]}],
    ]
)
CONFIG = st.fixed_dictionaries(
    {"config_name": st.sampled_from(["default", "main", "en", "b-1"])},
    optional={
        "data_files": st.one_of(
            MANY,
            st.lists(
                st.fixed_dictionaries({"split": SPLITS, "path": MANY}),
                min_size=1,
                max_size=3,
            ),
        ),
        "data_dir": FOLDER,
        "default": st.booleans(),
        "features": FEATURES,
        "sep": st.just(";"),
    },
)
INFO = st.fixed_dictionaries(
    {}, optional={"config_name": st.sampled_from(["default", "main", "en", "b-1", "other"]), "features": FEATURES}
)
CARD = st.fixed_dictionaries(
    {},
    optional={
        "configs": st.lists(CONFIG, min_size=1, max_size=3),
        "dataset_info": st.one_of(INFO, st.lists(INFO, min_size=1, max_size=2)),
    },
)
TYPED = st.sampled_from(
    [
        {"a": {"dtype": "int16", "id": None, "_type": "Value"}},
        {"a": {"names": ["x", "y"], "_type": "ClassLabel"}, "b": {"dtype": "string", "_type": "Value"}},
    ]
)
LEGACY = st.dictionaries(
    st.sampled_from(["default", "main", "en", "user--repo"]),
    st.fixed_dictionaries({}, optional={"features": TYPED}),
    min_size=1,
    max_size=2,
)
ARGUMENTS = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"data_files": st.one_of(MANY, st.dictionaries(SPLITS, MANY, min_size=1, max_size=3))}),
    st.fixed_dictionaries({"data_dir": FOLDER}),
    st.fixed_dictionaries({"data_dir": FOLDER, "data_files": MANY}),
)
ERROR = "error"


def fits_a_disk(paths: list[str]) -> bool:
    """False where one path would be a file and a folder at once."""
    return not any(other.startswith(f"{path}/") for path in paths for other in paths)


@dataclass(frozen=True)
class Said:
    """What a repo says of itself, in the three files in which it may."""

    card: str | None
    extra: str | None
    legacy: str | None

    @property
    def infos(self) -> int:
        return len(parse_card("any", self.card, self.extra, self.legacy).infos)


def ours(folder: Path, paths: list[str], said: Said, arguments: dict[str, Any]) -> dict[str | None, Any]:
    """What each config, and None for the default one, gives."""
    repo = RepoRef(str(folder), "0" * 40)
    request = data_request(str(folder), None, split=None, revision=None, columns=None, **arguments)
    files = [SourceFile(path, 1, "0" * 40, False) for path in paths]
    try:
        configs = resolve(
            repo,
            files,
            said.card,
            extra_yaml=said.extra,
            legacy_infos=said.legacy,
            data_files=request.data_files,
            data_dir=request.data_dir,
        )
    except CrucibleError:
        return {None: ERROR}
    found: dict[str | None, Any] = {}
    for name in (None, *(config.name for config in configs)):
        try:
            found[name] = _plain(choose(repo, configs, name, None)[0])
        except UnsupportedFormat:
            config = next(one for one in configs if one.name == name or (name is None and one.default))
            found[name] = _plain(config) if any(split.files for split in config.splits) else ERROR
        except CrucibleError:
            found[name] = ERROR
    return found


def _plain(config: ResolvedConfig) -> Any:
    options = config.splits[0].options
    splits = [(split.name, [file.path for file in split.files]) for split in config.splits]
    features = json.loads(options.features) if options.features and options.builder in READABLE else None
    return (config.name, options.builder, splits, features)


def theirs(folder: Path, names: list[str | None], arguments: dict[str, Any]) -> dict[str | None, Any]:
    """The same from `datasets`."""
    found: dict[str | None, Any] = {}
    for name in names:
        try:
            builder = datasets.load_dataset_builder(
                str(folder), name, cache_dir=str(folder.parent / "cache"), **arguments
            )
        except Exception:
            found[name] = ERROR
            continue
        config = builder.config
        if any(not files for files in config.data_files.values()) and not any(config.data_files.values()):
            found[name] = ERROR  # it fails when it is read
            continue
        features = builder.info.features or (config.features if builder.name in ("csv", "text") else None)
        splits = [
            (split, [path.removeprefix(f"{folder}/").replace("/./", "/").removeprefix("./") for path in paths])
            for split, paths in config.data_files.items()
        ]
        told = json.loads(json.dumps(features.to_dict())) if features and builder.name in READABLE else None
        found[name] = (config.name, builder.name, splits, told)
    return found


@settings(  # no shrinking: an example costs 50 ms, and a repo is small as it is
    max_examples=60,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    paths=PATHS.filter(fits_a_disk),
    card=CARD,
    extra=st.one_of(st.none(), st.none(), st.none(), CARD),
    legacy=st.one_of(st.none(), st.none(), st.none(), LEGACY),
    arguments=ARGUMENTS,
)
def test_a_generated_repo_resolves_as_in_datasets(
    paths: list[str],
    card: dict[str, Any],
    extra: dict[str, Any] | None,
    legacy: dict[str, Any] | None,
    arguments: dict[str, Any],
) -> None:
    said = Said(
        card=f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n" if card else None,
        extra=None if extra is None else yaml.safe_dump(extra, sort_keys=False),
        legacy=None if legacy is None else json.dumps(legacy),
    )
    files = dict.fromkeys(paths, "")
    files |= {} if said.extra is None else {".huggingface.yaml": said.extra}
    files |= {} if said.legacy is None else {"dataset_infos.json": said.legacy}
    root = Path(tempfile.mkdtemp())
    try:
        folder = root / "repo"
        listed = lay_out(folder, files, said.card)
        got = ours(folder, listed, said, arguments)
        written = [*card.get("configs", ()), *(extra or {}).get("configs", ())]
        names = list(dict.fromkeys([*got, *(config["config_name"] for config in written)]))
        expected = theirs(folder, names, arguments)
    finally:
        shutil.rmtree(root)
    for name, one in got.items():
        told = expected[name]
        if told == ERROR and (arguments or ERROR in got.values()):
            continue  # one config that cannot be used spoils the others in `datasets`
        if name is None and told != ERROR and told[3] is None and one != ERROR and said.infos > 1:
            assert one[:3] == told[:3]  # what is declared for a config counts, whether it was named or not
            continue
        assert one == told, name
    for name in names:
        assert name in got or expected[name] == ERROR
