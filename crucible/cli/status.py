"""`crucible status`: this node's store, and the jobs of a cluster."""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import options
from crucible.cli.show import count, human, print_facts, print_json, print_table

LAST = 5
"""Jobs that are shown; `crucible jobs` shows all."""


@click.command("status")
@options.address
@options.as_json
def command(address: str | None, as_json: bool) -> None:
    """Show this node's store; and a cluster's figures and jobs.

    The cluster is that at --address, else RAY_ADDRESS, else the one that this node's agent is in. `crucible jobs` and
    `crucible nodes` show more of it.

    \b
    Example:
      crucible status
      crucible status --address auto --json
    """
    from crucible.cluster import look

    here = look.status(address)
    if as_json:
        print_json(here)
        return
    print_facts(
        [
            ("store", here["home"]),
            ("shards", f"{here['shards']:,}, {human(here['bytes'])}"),
            ("free", human(here["free_bytes"])),
            ("agent", here["url"] or "not running"),
        ]
    )
    if here["manifests"]:
        click.echo()
        print_table(
            ("data", "config", "split", "commit", "rows", "shards here", "bytes"),
            [
                (
                    one["repo"],
                    one["config"],
                    one["split"] + (" (partial)" if one["partial"] else ""),
                    one["commit"][:8],
                    f"{one['rows']:,}",
                    f"{one['shards_here']}/{one['shards']}",
                    human(one["bytes"]),
                )
                for one in here["manifests"]
            ],
            left=4,
        )
    if "cluster" in here:
        click.echo()
        _show_cluster(here["cluster"])
        click.echo()
        if not here["jobs"]:
            click.echo("no jobs yet")
        for job in here["jobs"][-LAST:]:
            done = f"{job['items_done']} of {count(job['items'], 'item')}, {human(job['bytes_done'])}"
            click.echo(f"{job['job']}  {job['phase']}  {done}" + (f"\n  {job['error']}" if job["error"] else ""))


def _show_cluster(told: dict[str, Any]) -> None:
    drained = f", {told['drained']} of them drained" if told["drained"] else ""
    silent = f", and {told['silent']} that do not answer" if told.get("silent") else ""
    wrong = [f"{told[name]:,} {what}" for name, what in (("lost", "lost"), ("under", "on too few")) if told[name]]
    after = "by itself never" if told["repair_after"] is None else f"by itself {told['repair_after']:g} s after a loss"
    facts = [
        ("cluster", count(told["nodes"], "node") + drained + silent),
        ("shards", f"{told['shards']:,} in {told['copies']:,} copies, {human(told['bytes'])}"),
        ("wrong", ", ".join(wrong) or "nothing"),
        ("repairs", after),
    ]
    facts += [
        (
            one["kind"],
            f"waits for {one['waiting_for']}"
            if one["waiting_for"]
            else f"{one['phase']}, {one['copied']:,} of {one['copies']:,} copies",
        )
        for one in told["operations"]
        if one["phase"] not in ("done", "cancelled", "failed")
    ]
    print_facts(facts)
