"""`crucible data`: look at rows."""

from __future__ import annotations

import click

from crucible.cli.lazy import Lazy


@click.group("data", cls=Lazy, folder="crucible.cli.data_", names=("head",), no_args_is_help=True)
def command() -> None:
    """Look at the rows of a dataset.

    \b
    Example:
      crucible data head openai/gsm8k --config main -n 3
    """
