"""Options that several commands share, each spelt once."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from crucible.splits import is_split_name

_Command = Callable[..., Any]


def _split_commas(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str] | None:
    """`--columns a,b --columns c` is a, b, c; no option at all is None."""
    names = [name.strip() for value in values for name in value.split(",")]
    if "" in names:
        raise click.BadParameter("a column name is empty")
    return names or None


def _data_files(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, list[str]] | None:
    """`--data-files a.csv --data-files test:b.csv` is {train: [a.csv], test: [b.csv]}; no option at all is None."""
    files: dict[str, list[str]] = {}
    for value in values:
        split, colon, pattern = value.partition(":")
        named = colon and is_split_name(split) and not pattern.startswith("//")  # else a URL, refused by name later
        files.setdefault(split if named else "train", []).append(pattern if named else value)
    return files or None


def _features(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """JSON, or a file of it: a dict from column to feature, also as `dataset_info.json` has it, or a card's list."""
    if value is None:
        return None
    try:
        said = json.loads(value if value.lstrip()[:1] in ("{", "[") else Path(value).read_text("utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{value!r} is neither JSON nor a file that can be read ({error.strerror})") from None
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not JSON ({error})") from None
    if isinstance(said, dict) and isinstance(said.get("features"), (dict, list)) and "_type" not in said["features"]:
        said = said["features"]
    if isinstance(said, list):
        from crucible.feature_types import features_from_yaml  # imports pyarrow, which `--help` does not need

        try:
            return features_from_yaml(said)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    if not isinstance(said, dict):
        raise click.BadParameter("features are a dict from column to feature")
    return said


def _settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """`--set sep=; --set skiprows=1` is {sep: ";", skiprows: 1}: JSON where a value is that, else text."""
    found: dict[str, Any] = {}
    for value in values:
        name, equals, said = value.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{value!r} is not NAME=VALUE, such as sep=';'")
        if name in found:
            raise click.BadParameter(f"{name!r} is set twice")
        try:
            found[name] = json.loads(said)
        except ValueError:
            found[name] = said.replace("\\t", "\t")  # a shell hands on a backslash and a letter
    return found


repo = click.argument("repo")
config = click.option("--config", metavar="NAME", help="Config, where the repo has several.")
split = click.option(
    "--split", metavar="SPLIT", help="Split, slice ('train[:10%]') or sum (train+test); all splits without it."
)
data_dir = click.option("--data-dir", metavar="DIR", help="Only this folder of the repo.")
data_files = click.option(
    "--data-files",
    metavar="[SPLIT:]PATTERN",
    multiple=True,
    callback=_data_files,
    help="These files and not those the card names; repeatable.",
)
features = click.option(
    "--features",
    metavar="JSON|FILE",
    callback=_features,
    help="Types of the columns, before what the card and the files say.",
)
settings = click.option(
    "--set",
    "settings",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_settings,
    help="A setting of the files' format (sep=';', field=data); repeatable.",
)
revision = click.option("--revision", metavar="REV", help="Branch, tag or commit; main without it.")
columns = click.option(
    "--columns", metavar="A,B", multiple=True, callback=_split_commas, help="Convert these columns only; repeatable."
)
partial = click.option(
    "--partial",
    is_flag=True,
    help="Of parquet bring only the ranges of --columns; no hash can vouch for these.",
)
replicas = click.option(
    "--replicas",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Nodes that hold each shard.",
)
endpoint = click.option("--endpoint", metavar="URL", help="Another Hub than HF_ENDPOINT says.")
address = click.option("--address", metavar="ADDR", help="A running Ray cluster; `auto` finds this machine's.")
as_json = click.option("--json", "as_json", is_flag=True, help="JSON on stdout; docs/cli.md names the keys.")
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


def data(command: _Command) -> _Command:
    """REPO --config --split and what `reading` has: what names data."""
    for option in (reading, split, config, repo):
        command = option(command)
    return command


def reading(command: _Command) -> _Command:
    """--data-dir --data-files --features --set --revision --endpoint; settings come as arguments of their own names."""

    @functools.wraps(command)
    def with_settings(*given: Any, settings: dict[str, Any], **arguments: Any) -> Any:
        for name in settings:
            if name in arguments:
                raise click.UsageError(f"--set {name}: no setting of a format; there is --{name.replace('_', '-')}")
        return command(*given, **arguments, **settings)

    made: _Command = with_settings
    for option in (endpoint, revision, settings, features, data_files, data_dir):
        made = option(made)
    return made
