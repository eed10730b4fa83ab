"""`crucible import`: a bundle into this node's store."""

from __future__ import annotations

import click

from crucible.cli import options
from crucible.cli.export import as_dict, show
from crucible.cli.progress import Watch
from crucible.cli.show import print_json


@click.command("import")
@click.argument("path")
@click.option(
    "--lock", metavar="DIGEST", default="", help="What `crucible export` printed as lock; another bundle is refused."
)
@click.option("--address", metavar="ADDR", help="Tell all nodes of this Ray cluster; `auto` finds this machine's.")
@options.as_json
@options.quiet
def command(path: str, lock: str, address: str | None, as_json: bool, quiet: bool) -> None:
    """Take the bundle at PATH into this node's store.

    It reaches no Hub. As PATH, - is a tar on stdin. Every byte is checked on the way in, and nothing that is wrong
    becomes visible. What is here already is not taken again, so an interrupted import is continued by the same command.
    Afterwards the dataset loads by the same name and revision, with HF_HUB_OFFLINE=1 too; `crucible prefetch` with
    --replicas spreads it over a cluster.

    \b
    Example:
      crucible import gsm8k.tar
      crucible import /mnt/usb/gsm8k --address auto
    """
    from crucible.cluster.bundles import import_bundle

    with Watch(path, quiet=quiet) as watch:
        report = import_bundle(path, lock=lock, address=address, on_progress=watch.update)
    if as_json:
        print_json(as_dict(report))
    else:
        show(report)
