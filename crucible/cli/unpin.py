"""`crucible unpin`: let a dataset be evicted again."""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import count, print_json


@click.command("unpin")
@admin.choice(required=True)
@options.address
@options.as_json
def command(chosen: Any, address: str | None, as_json: bool) -> None:
    """Let a dataset be evicted again. Removes nothing.

    TARGET is a repo or the beginning of a manifest's id. With --address or RAY_ADDRESS on all nodes of that cluster,
    else on this node.

    \b
    Example:
      crucible unpin openai/gsm8k
    """
    from crucible.cluster import manage

    told = manage.unpin(chosen, address=address)
    if as_json:
        print_json(told)
    else:
        click.echo(f"{count(len(told['manifests']), 'manifest')} unpinned on {count(told['nodes'], 'node')}")
    admin.show_problems(told["problems"])
