"""`crucible locate`: which nodes hold the shards of a dataset."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from crucible.cli import options
from crucible.cli.show import human, print_json, print_table


@click.command("locate")
@options.data
@options.columns
@options.partial
@options.address
@options.as_json
def command(as_json: bool, **request: Any) -> None:
    """Show which nodes of a cluster hold the shards of REPO.

    REPO must have been prefetched. With --json one object a shard.

    \b
    Example:
      crucible locate openai/gsm8k --config main --split train
    """
    from crucible import session

    found = session.locate(**request)
    if as_json:
        for shard in found:
            print_json(asdict(shard))
        return
    print_table(
        ("split", "shard", "held by", "rows", "bytes"),
        [
            (one.split, f"{one.shard} {one.key[:8]}", "\n".join(one.urls) or "nobody", f"{one.rows:,}", human(one.size))
            for one in found
        ],
        left=3,
    )
