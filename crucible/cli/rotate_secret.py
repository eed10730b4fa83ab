"""`crucible rotate-secret`: a new secret for the nodes of a cluster."""

from __future__ import annotations

import click

from crucible.cli import admin, options
from crucible.cli.show import print_json


@click.command("rotate-secret")
@click.option(
    "--overlap",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    help="How long the old secret is accepted; 0 when it may be known to others.",
)
@admin.yes
@options.address
@options.as_json
def command(overlap: float, yes: bool, address: str | None, as_json: bool) -> None:
    """Give the nodes of a cluster a new secret.

    Readers go on: the old secret is accepted until --overlap is over, and then refused. The cluster is that of
    --address, else RAY_ADDRESS, else the one running on this machine. Nobody sees the secret itself.

    \b
    Example:
      crucible rotate-secret --address auto -y
      crucible rotate-secret --overlap 0
    """
    from crucible import session

    admin.go_ahead("Give all nodes of this cluster a new secret?", yes, look="")
    told = session.rotate_secret(address, overlap_s=overlap)
    if as_json:
        print_json(told)
    else:
        click.echo(f"secret {told['number']} counts now; the one before is accepted for {told['overlap_s']:g} s more")
    for node, problem in told["missed"].items():
        click.echo(f"node {node[:12]} has not heard of it and will be asked again: {problem}", err=True)
    if told["missed"]:
        raise click.exceptions.Exit(1)
