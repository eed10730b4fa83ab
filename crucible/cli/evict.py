"""`crucible evict`: take shards off disks."""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import count, human, print_json, print_table
from crucible.errors import UsageError


@click.command("evict")
@admin.choice()
@click.option(
    "--bytes", "need", metavar="SIZE", help="In place of TARGET: so much of what is least missed, on each node."
)
@click.option("--node", "nodes", metavar="NODE", multiple=True, help="Only on this node of a cluster; repeatable.")
@admin.dry_run
@admin.yes
@options.address
@options.as_json
def command(
    chosen: Any,
    need: str | None,
    nodes: tuple[str, ...],
    dry_run: bool,
    yes: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Take shards off the disks.

    Those of a dataset, or what is least missed. TARGET is a repo or the beginning of a manifest's id. With
    --address or RAY_ADDRESS from all nodes of that cluster, else from this node's store. What is pinned, being
    read, or the last copy of what cannot be fetched again stays. A dataset that is evicted from all nodes is given
    up: no repair brings it back, a prefetch does.

    \b
    Example:
      crucible evict openai/gsm8k --dry-run
      crucible evict --bytes 100GB -y
    """
    from crucible.cluster import manage
    from crucible.config import parse_size

    if bool(chosen) == (need is not None):
        raise UsageError("name what to evict, or how much with --bytes; `crucible status` lists what there is")
    size = 0 if need is None else parse_size(need, "--bytes")
    if not dry_run:
        admin.go_ahead(f"Remove {chosen if need is None else need + ' a node'} from the disks?", yes)
    told = manage.evict(chosen or None, need_bytes=size, nodes=nodes, dry_run=dry_run, address=address)
    if as_json:
        print_json(told)
    elif told["nodes"]:
        lines = [(one["node"][:12], *_figures(one)) for one in told["nodes"]]
        print_table(("node", "would go" if dry_run else "gone", "bytes", "kept"), lines)
    else:
        click.echo("nothing to remove")
    if kept := sum(one["kept"] for one in told["nodes"]):
        click.echo(f"{count(kept, 'shard')} kept: pinned, being read, or not to be had again", err=True)
    admin.show_problems(told["problems"])


def _figures(one: dict[str, Any]) -> tuple[str, str, str]:
    return f"{one['shards']:,}", human(one["bytes"]), f"{one['kept']:,}"
