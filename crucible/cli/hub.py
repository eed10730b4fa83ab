"""`crucible hub`: a Hub of your own."""

from __future__ import annotations

import click

from crucible.cli.lazy import Lazy


@click.group("hub", cls=Lazy, folder="crucible.cli.hub_", names=("serve",), no_args_is_help=True)
def command() -> None:
    """Run a Hub of your own.

    \b
    Example:
      crucible hub serve ./my-hub --import ./my-data me/my-data
    """
