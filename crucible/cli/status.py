"""`crucible status`: this node's store, and the jobs of a cluster."""

from __future__ import annotations

import click

from crucible.cli import options
from crucible.cli.show import count, human, print_facts, print_json, print_table


@click.command("status")
@options.address
@options.as_json
def command(address: str | None, as_json: bool) -> None:
    """Show this node's store, and the jobs of a cluster.

    The jobs are those of the cluster at --address or RAY_ADDRESS, since its coordinator started.

    \b
    Example:
      crucible status
      crucible status --address auto --json
    """
    from crucible import session

    here = session.status(address)
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
    if "jobs" in here:
        click.echo()
        if not here["jobs"]:
            click.echo("no jobs since the coordinator started")
        for job in here["jobs"]:
            done = f"{job['items_done']} of {count(job['items'], 'item')}, {human(job['bytes_done'])}"
            click.echo(f"{job['job']}  {job['phase']}  {done}" + (f"\n  {job['error']}" if job["error"] else ""))
