"""`crucible nodes`: the nodes of a cluster and what their stores hold."""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import options
from crucible.cli.show import human, print_json, print_table


@click.command("nodes")
@options.address
@options.as_json
def command(address: str | None, as_json: bool) -> None:
    """List the nodes of a running cluster with their stores.

    The cluster is that of --address, else RAY_ADDRESS, else the one running on this machine. With --json one object a
    node.

    \b
    Example:
      crucible nodes
      crucible nodes --address 10.0.0.1:6379 --json
    """
    from crucible import session

    found = session.nodes(address)
    if as_json:
        for node in found:
            print_json(node)
        return
    print_table(("node", "agent", "shards", "bytes", "free"), [_line(node) for node in found], left=2)


def _line(node: dict[str, Any]) -> tuple[str, ...]:
    if not node["alive"]:
        return node["node"][:12], f"no answer: {node['problem']}", "", "", ""
    return node["node"][:12], node["url"], f"{node['shards']:,}", human(node["bytes"]), human(node["free_bytes"])
