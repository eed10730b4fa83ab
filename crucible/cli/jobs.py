"""`crucible jobs`: what a cluster was asked to prefetch, and how it went."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import human, print_json, print_table


@click.command("jobs")
@admin.limit
@options.address
@options.as_json
def command(limit: int, address: str | None, as_json: bool) -> None:
    """List the jobs of a cluster, the newest last.

    Those from before a restart of its coordinator are remembered. The cluster is that of --address, else
    RAY_ADDRESS, else the one running on this machine. With --json one object a job.

    \b
    Example:
      crucible jobs
      crucible jobs --limit 0 --json
    """
    from crucible.cluster import manage

    found = manage.jobs(address, limit or None)
    if as_json:
        for job in found:
            print_json(job)
        return
    if not found:
        click.echo("no jobs yet")
        return
    print_table(("job", "data", "phase", "began", "items", "bytes"), [_line(job) for job in found], left=4)
    for job in found:
        if job["error"]:
            click.echo(f"{job['job']}: {job['error']}")


def _line(job: dict[str, Any]) -> tuple[str, ...]:
    began = datetime.fromtimestamp(job["started"]).strftime("%m-%d %H:%M") if job["started"] else ""
    data = "/".join(filter(None, (job["repo"], job["config"], job["split"])))
    items = f"{job['items_done']}/{job['items']}"
    return job["job"], data, job["phase"], began, items, human(job["bytes"])
