"""`crucible locate`: which nodes hold the shards of a dataset."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import admin, options
from crucible.cli.show import count, human, print_json, print_table

if TYPE_CHECKING:
    from crucible.cluster.look import Located


@click.command("locate")
@options.data
@options.columns
@options.partial
@admin.limit
@options.address
@options.as_json
def command(as_json: bool, limit: int, **request: Any) -> None:
    """Show which nodes of a cluster hold the shards of REPO.

    REPO must have been prefetched to this node. The cluster is that of --address, else RAY_ADDRESS, else the one that
    this node's agent is in; without one it is shown which shards this node has. With --json one object a shard.

    \b
    Example:
      crucible locate openai/gsm8k --config main --split train --address auto
    """
    from crucible.cluster.look import whereabouts

    found = whereabouts(limit=limit or None, **request)
    if as_json:
        for shard in found.shards:
            print_json(asdict(shard))
        return
    for one in found.manifests:
        wrong = "".join(f", {one[name]:,} {what}" for name, what in _WRONG.items() if one.get(name))
        click.echo(
            f"{one['repo']} {one['config']} {one['split']}: {count(one['shards'], 'shard')}, {human(one['bytes'])}, "
            f"{count(one['copies'], 'copy', 'copies')}{wrong}"
        )
    print_table(
        ("split", "shard", "held by", "rows", "bytes"),
        [
            (one.split, f"{one.shard} {one.key[:8]}", _held(one), f"{one.rows:,}", human(one.size))
            for one in found.shards
        ],
        left=3,
    )
    whole = sum(one["shards"] for one in found.manifests)
    if len(found.shards) < whole:
        click.echo(f"and {whole - len(found.shards):,} more; --limit 0 shows all")


_WRONG = {"lost": "not there", "under": "on too few nodes"}


def _held(one: Located) -> str:
    return "\n".join(one.urls or one.nodes) or "nobody"
