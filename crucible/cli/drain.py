"""`crucible drain`: empty a node, so that it can go."""

from __future__ import annotations

import click

from crucible.cli import admin, options
from crucible.cli.show import print_json
from crucible.errors import UsageError


@click.command("drain")
@click.argument("nodes", metavar="[NODE]...", nargs=-1)
@click.option("--self", "own", is_flag=True, help="The node of this machine's store: for a preStop hook or an epilog.")
@click.option(
    "--grace", metavar="SECONDS", type=click.FloatRange(min=0), help="Give up after so long. [default: never]"
)
@click.option("--undo", is_flag=True, help="Let the nodes have work again.")
@admin.dry_run
@options.address
@options.quiet
@options.as_json
def command(
    nodes: tuple[str, ...],
    own: bool,
    grace: float | None,
    undo: bool,
    dry_run: bool,
    address: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Empty nodes, so that they can go.

    They get no new work, what they work on is let end, and what only they hold is copied to others, last copies
    first. NODE is the beginning of a node's id, host or url, as `crucible nodes` shows it. A drained node goes on
    serving what it has, so that no reader notices, until it is stopped. What it still works on after --grace is ended
    and done by others. Ends with 1 if it holds shards still that nobody else has.

    \b
    Example:
      crucible drain 10.0.0.7
      crucible drain --self --grace 30
      crucible drain --undo 10.0.0.7
    """
    from crucible.cluster import manage

    if own == bool(nodes):
        raise UsageError("name the nodes to drain, or give --self; `crucible nodes` lists them")
    leaving = [manage.own_node()] if own else list(nodes)
    if undo:
        back = manage.undrain(leaving, address)
        if as_json:
            print_json({"undrained": back})
        else:
            click.echo("\n".join(f"{node[:12]} gets work again" for node in back) or "none of them was drained")
        return
    told = manage.drain(leaving, grace_s=grace, dry_run=dry_run, address=address, on_progress=admin.progress(quiet))
    admin.show_operation(told, as_json)
