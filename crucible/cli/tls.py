"""`crucible tls`: certificates for the nodes of a cluster, made on a machine that is none of them."""

from __future__ import annotations

from pathlib import Path

import click

from crucible.cli import options
from crucible.cli.show import print_json


@click.command("tls")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("hosts", nargs=-1, required=True, metavar="HOST...")
@click.option(
    "--days", metavar="N", type=click.IntRange(1, 3650), default=398, show_default=True, help="Valid so long."
)
@options.as_json
def command(folder: Path, hosts: tuple[str, ...], days: int, as_json: bool) -> None:
    """Make certificates for the nodes of a cluster.

    HOST is a node's address as Ray knows it. The authority is made too, if FOLDER has none.

    FOLDER keeps the authority's key and goes to no node. FOLDER/HOST is what CRUCIBLE_TLS names on that node.
    CRUCIBLE_TLS=1 needs none of this: crucible then makes everything itself, and all nodes can make certificates.

    \b
    Example:
      crucible tls ./cluster-tls 10.0.0.1 10.0.0.2
      scp -r ./cluster-tls/10.0.0.1 10.0.0.1:/etc/crucible-tls
    """
    from crucible.workers.tls import issue, make_authority

    make_authority(folder)
    for host in hosts:
        issue(folder, folder / host, host, days)
        if as_json:
            print_json({"host": host, "folder": str(folder / host), "days": days})
        else:
            click.echo(f"{host}  {folder / host}")
