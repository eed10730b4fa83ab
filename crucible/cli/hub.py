"""`crucible hub`: the files of the Hub, and a Hub of your own."""

from __future__ import annotations

import click

from crucible.cli.lazy import Lazy


@click.group("hub", cls=Lazy, folder="crucible.cli.hub_", names=("pull", "serve"), no_args_is_help=True)
def command() -> None:
    """Bring files from the Hub, or run a Hub of your own.

    \b
    Example:
      crucible hub pull openai/gsm8k
      crucible hub serve ./my-hub --import ./my-data me/my-data
    """
