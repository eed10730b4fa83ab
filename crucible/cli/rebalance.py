"""`crucible rebalance`: give new nodes their share of the shards."""

from __future__ import annotations

import click

from crucible.cli import admin, options


@click.command("rebalance")
@admin.dry_run
@admin.yes
@options.address
@options.quiet
@options.as_json
def command(dry_run: bool, yes: bool, address: str | None, quiet: bool, as_json: bool) -> None:
    """Move shards to nodes that hold less than their share.

    A node's share follows the size of its disk. Only what makes the difference moves, and a copy goes only when the
    new one is there. Readers do not notice.

    \b
    Example:
      crucible rebalance --dry-run
      crucible rebalance -y
    """
    from crucible.cluster import manage

    if not dry_run:
        admin.go_ahead("Move shards between the nodes of this cluster?", yes)
    told = manage.rebalance(dry_run=dry_run, address=address, on_progress=admin.progress(quiet))
    admin.show_operation(told, as_json)
