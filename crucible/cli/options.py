"""Options that several commands share, each spelt once."""

from __future__ import annotations

from collections.abc import Callable
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
    """REPO --config --split --data-dir --data-files --revision --endpoint: what names data."""
    for option in (endpoint, revision, data_files, data_dir, split, config, repo):
        command = option(command)
    return command
