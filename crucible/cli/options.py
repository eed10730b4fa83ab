"""Options that several commands share, each spelt once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_Command = Callable[..., Any]


def _split_commas(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str] | None:
    """`--columns a,b --columns c` is a, b, c; no option at all is None."""
    names = [name.strip() for value in values for name in value.split(",")]
    if "" in names:
        raise click.BadParameter("a column name is empty")
    return names or None


repo = click.argument("repo")
config = click.option("--config", metavar="NAME", help="Config, where the repo has several.")
split = click.option("--split", metavar="NAME", help="Split; all splits without it.")
revision = click.option("--revision", metavar="REV", help="Branch, tag or commit; main without it.")
columns = click.option(
    "--columns", metavar="A,B", multiple=True, callback=_split_commas, help="Convert these columns only; repeatable."
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
    """REPO --config --split --revision --endpoint: what names data."""
    for option in (endpoint, revision, split, config, repo):
        command = option(command)
    return command
