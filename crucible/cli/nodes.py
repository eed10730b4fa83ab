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
    from crucible.cluster import look

    found = look.nodes(address)
    if as_json:
        for node in found:
            print_json(node)
        return
    print_table(("node", "agent", "state", "shards", "bytes", "free"), [_line(node) for node in found], left=3)
    for node in found:
        for note in [*([node["problem"]] if node["state"] == "silent" else []), *node.get("notes", ())]:
            click.echo(f"node {node['node'][:8]}: {note}")


def _line(node: dict[str, Any]) -> tuple[str, ...]:
    name, state = node["node"][:8], " ".join(filter(None, (node["state"], node.get("rack", ""))))
    if node["state"] == "refused":
        return name, node["problem"], "refused", "", "", ""
    problem = "does not answer" if node["state"] == "silent" else node.get("problem", "")
    agent = node["url"] if node["alive"] else f"{node['url']} {problem}".strip()
    free = human(node["free_bytes"]) if "free_bytes" in node else "?"
    return name, agent, state, f"{node['shards']:,}", human(node["bytes"]), free
