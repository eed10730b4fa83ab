"""`crucible pin`: keep a dataset, whatever else needs the room."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import count, print_json, print_table


@click.command("pin")
@admin.choice()
@click.option("--note", metavar="TEXT", default="", help="Why; shown with the pin.")
@options.address
@options.as_json
def command(chosen: Any, note: str, address: str | None, as_json: bool) -> None:
    """Keep a dataset on disk, whatever else needs the room.

    TARGET is a repo or the beginning of a manifest's id. With --address or RAY_ADDRESS on all nodes of that cluster,
    also on those that join later; else on this node. Without TARGET the pins of this node are listed.

    \b
    Example:
      crucible pin openai/gsm8k --note "run 17"
      crucible pin
    """
    from crucible.cluster import manage

    if not chosen:
        found = manage.pins()
        if as_json:
            for one in found:
                print_json(one)
            return
        if not found:
            click.echo("nothing is pinned on this node")
            return
        lines = [(one["manifest"][:12], _day(one["since"]), one["note"]) for one in found]
        print_table(("manifest", "since", "note"), lines, left=3)
        return
    told = manage.pin(chosen, note, address=address)
    if as_json:
        print_json(told)
    else:
        click.echo(f"{count(len(told['manifests']), 'manifest')} pinned on {count(told['nodes'], 'node')}")
    admin.show_problems(told["problems"])


def _day(since: float) -> str:
    return datetime.fromtimestamp(since).strftime("%Y-%m-%d") if since else ""
