"""Resolution gives what `datasets` 5.2 gives: the oracle is asked on a real folder, we on its listing alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.cluster.builders import READABLE
from crucible.cluster.patterns import BadPattern, Listing, compile_glob
from crucible.cluster.resolve import ResolvedConfig, choose, resolve
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
)
from crucible.refs import RepoRef, SourceFile
from tests.cluster.resolve_cases import CARDS, CONVENTIONS, LEGACY, card, lay_out
from tests.oracle import datasets

REPO = RepoRef("someone/repo", "0" * 40)


def listing(*paths: str) -> list[SourceFile]:
    return [SourceFile(path, 1, "0" * 40, False) for path in paths]


def ours(files: list[SourceFile], text: str | None, legacy: str | None = None) -> dict[str, Any] | str:
    try:
        configs = resolve(REPO, files, text, legacy_infos=legacy)
    except CrucibleError:
        return "error"
    found = {config.name: _plain(config) for config in configs}
    if all(one == "error" for one in found.values()):
        return "error"
    try:
        return {**found, "the default": choose(REPO, configs, None, None)[0].name}
    except ConfigRequired:
        return {**found, "the default": None}
    except UnsupportedFormat:
        return {**found, "the default": next(config.name for config in configs if config.default)}


def _plain(config: ResolvedConfig) -> dict[str, Any] | str:
    if config.problem is not None and not isinstance(config.problem, UnsupportedFormat):
        return "error"
    options = config.splits[0].options
    return {
        "builder": options.builder,
        "splits": {split.name: [file.path for file in split.files] for split in config.splits},
        "features": json.loads(options.features) if options.features else None,
    }


def theirs(folder: Path) -> dict[str, Any] | str:
    """The same facts from `datasets`: it resolves when a builder is made, without reading data."""
    try:
        names = datasets.get_dataset_config_names(str(folder))
    except Exception:
        return "error"
    found = {name: _their_config(folder, name) for name in names}
    try:
        return {**found, "the default": datasets.load_dataset_builder(str(folder)).config.name}
    except Exception:
        return {**found, "the default": None}


def _their_config(folder: Path, name: str) -> dict[str, Any] | str:
    try:
        builder = datasets.load_dataset_builder(str(folder), name)
    except Exception:
        return "error"
    features = builder.info.features or (builder.config.features if builder.name in ("csv", "text") else None)
    root = str(folder) + "/"
    return {
        "builder": builder.name,
        "splits": {
            split: [path.removeprefix(root).replace("/./", "/").removeprefix("./") for path in paths]
            for split, paths in builder.config.data_files.items()
        },
        # builders crucible has no reader for bring features of their own
        "features": json.loads(json.dumps(features.to_dict())) if features and builder.name in READABLE else None,
    }


@pytest.mark.parametrize("case", CONVENTIONS, ids=str)
def test_names_of_files_decide_the_splits_as_in_datasets(case: str, tmp_path: Path) -> None:
    files = listing(*lay_out(tmp_path / "repo", CONVENTIONS[case], None))
    assert ours(files, None) == theirs(tmp_path / "repo")


@pytest.mark.parametrize("case", CARDS, ids=str)
def test_the_card_decides_as_in_datasets(case: str, tmp_path: Path) -> None:
    paths, yaml = CARDS[case]
    files = listing(*lay_out(tmp_path / "repo", paths, card(yaml)))
    assert ours(files, card(yaml)) == theirs(tmp_path / "repo")


@pytest.mark.parametrize("case", LEGACY, ids=str)
def test_infos_of_old_repos_say_what_the_card_does_not(case: str, tmp_path: Path) -> None:
    paths, yaml = LEGACY[case]
    text = None if yaml is None else card(yaml)
    files = listing(*lay_out(tmp_path / "repo", paths, text))
    assert ours(files, text, paths["dataset_infos.json"]) == theirs(tmp_path / "repo")


def test_a_config_whose_folder_is_missing_does_not_spoil_the_others() -> None:
    text = card("configs:\n- config_name: en\n  data_dir: en\n- config_name: fr\n  data_dir: fr")
    configs = resolve(REPO, listing("en/train.csv"), text)
    assert [file.path for file in choose(REPO, configs, "en", None)[1][0].files] == ["en/train.csv"]
    with pytest.raises(NoDataFiles, match="fr"):
        choose(REPO, configs, "fr", None)


def test_choosing_names_what_there_is() -> None:
    text = card("configs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv")
    configs = resolve(REPO, listing("a.csv", "b.csv"), text)
    with pytest.raises(ConfigRequired, match="a, b"):
        choose(REPO, configs, None, None)
    with pytest.raises(ConfigNotFound, match=r"'c'.*a, b"):
        choose(REPO, configs, "c", None)
    with pytest.raises(SplitNotFound, match=r"'test'.*train"):
        choose(REPO, configs, "a", "test")
    assert [split.name for split in choose(REPO, configs, "b", "train")[1]] == ["train"]


def test_a_script_is_refused_with_the_ref_to_use_instead() -> None:
    with pytest.raises(ScriptRepo, match="refs/convert/parquet"):
        resolve(REPO, listing("repo.py", "a.csv"), None, refs=["refs/convert/parquet"])
    with pytest.raises(ScriptRepo, match="never runs"):
        resolve(REPO, listing("repo.py"), None)
    assert resolve(REPO, listing("other.py", "a.csv"), None)


@pytest.mark.parametrize("path", ["../a.csv", "x/../../a.csv", "a\\b.csv", "C:a.csv", "x//a.csv"])
def test_an_unsafe_path_is_refused_only_when_it_is_data(path: str) -> None:
    with pytest.raises(UnsafePath):
        choose(
            REPO,
            resolve(REPO, listing(path, "b.csv"), card("configs:\n- config_name: m\n  data_files: '**'")),
            None,
            None,
        )
    text = card("configs:\n- config_name: m\n  data_files: b.csv")
    assert choose(REPO, resolve(REPO, listing(path, "b.csv"), text), None, None)


@pytest.mark.parametrize(
    "path", ["https://example.com/a.csv", "/etc/a.csv", "../a.csv", "hf://datasets/x/y/a.csv", "s3://b/a"]
)
def test_the_card_cannot_name_files_outside_the_repo(path: str) -> None:
    with pytest.raises(InvalidCard, match="outside"):
        resolve(REPO, listing("a.csv"), card(f"configs:\n- config_name: m\n  data_files: '{path}'"))


def test_declared_rows_and_settings_reach_the_split() -> None:
    text = card(
        "configs:\n- config_name: m\n  data_files: a.csv\n  sep: ';'\n  colour: red\n"
        "dataset_info:\n- config_name: m\n  splits:\n  - name: train\n    num_examples: 7"
    )
    split = resolve(REPO, listing("a.csv"), text)[0].splits[0]
    assert split.declared_rows == 7
    assert split.options.params == (("sep", '";"'),)


def test_the_extra_yaml_overrides_the_card() -> None:
    text = card("configs:\n- config_name: m\n  data_files: a.csv")
    extra = "configs:\n- config_name: n\n  data_files: b.csv"
    assert [c.name for c in resolve(REPO, listing("a.csv", "b.csv"), text, extra_yaml=extra)] == ["n"]


def test_an_unreadable_format_is_named_with_the_readable_ones() -> None:
    configs = resolve(REPO, listing("a.h5", "b.h5"), None)
    with pytest.raises(UnsupportedFormat, match=r"hdf5.*parquet"):
        choose(REPO, configs, None, None)


def test_broken_yaml_names_its_line() -> None:
    with pytest.raises(InvalidCard, match="line 3"):
        resolve(REPO, listing("a.csv"), "---\na: 1\nb: [\n---\n")


PIECES = st.sampled_from(
    ["a", "b", ".", "_", "__", "-", "*", "**", "?", "[ab]", "[!a]", "[a-b]", "[]", "[!]", "[", "]", "/", "1", "^"]
)
NAMES = st.lists(st.sampled_from(["a", "b", ".", "__", "-", "1", "[", "]", "^"]), min_size=1, max_size=4).map("".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    pattern=st.lists(PIECES, min_size=1, max_size=7).map("".join),
    paths=st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6),
)
def test_a_glob_matches_what_fsspec_matches(pattern: str, paths: list[str]) -> None:
    parts = pattern.split("/")
    if "" in parts or any(set(part) == {"."} for part in parts):
        return  # such patterns are cleaned before they get here
    paths = [path for path in paths if not any(set(part) == {"."} for part in path.split("/"))]
    import re

    from datasets.data_files import (
        _is_inside_unrequested_special_dir,
        _is_unrequested_hidden_file_or_is_inside_unrequested_hidden_dir,
    )
    from fsspec.utils import glob_translate

    try:
        regex = re.compile(glob_translate(pattern))
    except (ValueError, re.error):
        return
    expected = sorted(
        path
        for path in paths
        if regex.match(path)
        and not _is_inside_unrequested_special_dir(path, pattern)
        and not _is_unrequested_hidden_file_or_is_inside_unrequested_hidden_dir(path, pattern)
    )
    assert [file.path for file in Listing(listing(*paths)).glob(pattern)] == expected


def test_a_double_star_inside_a_name_is_refused() -> None:
    with pytest.raises(BadPattern):
        compile_glob("a**")


@pytest.mark.parametrize(
    "shape", ["data/train-{0:05d}-of-99999.parquet", "train/{1}/x{0}.jsonl", "stuff{1}/testing-{0}.jsonl", "q/{0}.json"]
)
def test_ten_times_the_files_take_about_ten_times_as_long(shape: str) -> None:
    def cost(count: int) -> float:
        files = listing(*(shape.format(number, number % 100) for number in range(count)))
        start = time.process_time()
        config = resolve(REPO, files, None)[0]
        assert sum(len(split.files) for split in config.splits) == count
        return time.process_time() - start

    few = min(cost(5_000), cost(5_000))
    # 100 times would be quadratic. Again if need be: what else the process and the machine did counts as spent
    assert any(cost(50_000) < 40 * few for _ in range(3))


def test_many_configs_do_not_each_walk_all_files() -> None:
    def cost(configs: int) -> float:
        files = listing(*(f"c{number % configs}/{number}.csv" for number in range(20_000)))
        named = "\n".join(f"- config_name: c{n}\n  data_files: c{n}/*.csv" for n in range(configs))
        start = time.process_time()
        found = resolve(REPO, files, card(f"configs:\n{named}"))
        assert all(len(config.splits[0].files) == 20_000 // configs for config in found)
        return time.process_time() - start

    few = min(cost(10), cost(10))
    assert any(cost(400) < 20 * few for _ in range(3))  # 40 times would be a walk over all files for each config
