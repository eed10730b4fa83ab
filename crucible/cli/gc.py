"""`crucible gc`: remove what nobody needs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import count, human, print_json, print_table


@click.command("gc")
@admin.dry_run
@admin.yes
@admin.limit
@options.address
@options.as_json
def command(dry_run: bool, yes: bool, limit: int, address: str | None, as_json: bool) -> None:
    """Remove what nobody needs.

    What crashes left behind, what no manifest names, quarantine older than a week. With --address or RAY_ADDRESS on
    all nodes of that cluster, else in this node's store. With --json one object, with everything that goes.

    \b
    Example:
      crucible gc --dry-run
      crucible gc -y --address auto
    """
    from crucible.cluster import manage

    told = manage.gc(dry_run=True, address=address) if dry_run or not yes else None
    if not dry_run:
        if told is not None and told["litter"]:
            whole = sum(one["bytes"] for one in told["litter"])
            admin.go_ahead(f"Remove {count(len(told['litter']), 'thing')}, {human(whole)}?", yes)
        if told is None or told["litter"]:
            told = manage.gc(dry_run=False, address=address)
    assert told is not None
    if as_json:
        print_json(told)
    else:
        _show(told["litter"], limit, "would go" if dry_run else "gone")
    admin.show_problems(told["problems"])


def _show(litter: list[dict[str, Any]], limit: int, fate: str) -> None:
    if not litter:
        click.echo("nothing to remove")
        return
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for one in litter:
        kinds[one["node"], one["kind"]].append(one["bytes"])
    lines = [(node[:12], kind, f"{len(sizes):,}", human(sum(sizes))) for (node, kind), sizes in sorted(kinds.items())]
    print_table(("node", "what", fate, "bytes"), lines[: limit or None], left=2)
    if limit and len(lines) > limit:
        click.echo(f"and {len(lines) - limit:,} lines more; --limit 0 shows all")
