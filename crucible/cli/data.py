"""`crucible data`: look at rows, columns and what is in them."""

from __future__ import annotations

import click

from crucible.cli.lazy import Lazy


@click.group("data", cls=Lazy, folder="crucible.cli.data_", names=("head", "schema", "stats"), no_args_is_help=True)
def command() -> None:
    """Look at a dataset: its rows, columns and values.

    \b
    Example:
      crucible data head openai/gsm8k --config main -n 3
      crucible data stats openai/gsm8k --config main --split train
    """
