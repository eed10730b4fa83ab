"""`crucible repair`: every shard on as many nodes as it should be."""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import print_json
from crucible.errors import UsageError


def _after(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Seconds, or `off`, which is less than none."""
    if value is None:
        return None
    if value == "off":
        return -1.0
    try:
        return max(0.0, float(value))
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither a number of seconds nor `off`") from None


@click.command("repair")
@admin.choice()
@click.option("--replicas", metavar="N", type=click.IntRange(min=1), help="Nodes that hold each shard, from now on.")
@click.option("--trim", is_flag=True, help="Also drop copies that are more than wanted.")
@click.option(
    "--after", metavar="SECONDS|off", callback=_after, help="When to repair unasked after a loss; only set it."
)
@admin.dry_run
@admin.yes
@options.address
@options.quiet
@options.as_json
def command(chosen: Any, after: float | None, yes: bool, quiet: bool, as_json: bool, **asked: Any) -> None:
    """Bring every shard to as many nodes as should hold it.

    TARGET is a repo or the beginning of a manifest's id; all without it. Copies come from other nodes; what nobody
    holds any more is made again from its source. Ends with 1 if shards are left that are on too few nodes.

    \b
    Example:
      crucible repair --dry-run
      crucible repair openai/gsm8k --replicas 2 --trim -y
      crucible repair --after 600
    """
    from crucible.cluster import manage

    if after is not None:
        if chosen or asked["trim"] or asked["replicas"]:
            raise UsageError("--after is for the whole cluster, and repairs nothing now; give it alone")
        seconds = None if after < 0 else after
        manage.set_repair_after(seconds, asked["address"])
        if as_json:
            print_json({"repair_after": seconds})
        else:
            click.echo(
                "the cluster repairs " + ("only when asked" if seconds is None else f"{seconds:g} s after a loss")
            )
        return
    if asked["trim"] and not asked["dry_run"]:
        admin.go_ahead("Drop the copies that are more than wanted?", yes)
    admin.show_operation(manage.repair(chosen, on_progress=admin.progress(quiet), **asked), as_json)
