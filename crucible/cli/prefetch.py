"""`crucible prefetch`: bring a repo into the stores of a cluster."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import options
from crucible.cli.progress import Watch
from crucible.cli.show import count, human, print_facts, print_json, print_table

if TYPE_CHECKING:
    from crucible.report import JobReport


@click.command("prefetch")
@click.argument("repo", required=False)
@options.config
@options.split
@options.reading
@options.columns
@options.partial
@options.replicas
@options.address
@click.option("--nodes", metavar="N", type=click.IntRange(min=1), help="Use at most this many nodes.")
@click.option("--keep-raw", is_flag=True, help="Keep the downloaded files too, in the Hub cache.")
@click.option(
    "--lock",
    metavar="FILE",
    help="Exactly what this lock file, or the bundle here, says, in place of REPO and its options.",
)
@options.as_json
@options.quiet
def command(repo: str | None, lock: str | None, as_json: bool, quiet: bool, **request: Any) -> None:
    """Bring REPO into the stores of a cluster, each byte once.

    Each file is verified while it arrives and converted into Arrow shards. REPO is a dataset's name on the Hub, or a
    folder (./my-repo). Without --address (or RAY_ADDRESS) Ray is started on
    this machine and ends with the command. What is in the stores already is not fetched again. Of a slice
    (--split 'train[:10%]') the whole split is brought.

    \b
    Example:
      crucible prefetch openai/gsm8k --config main
      crucible prefetch openai/gsm8k --config main --split train --address auto
      crucible prefetch --lock gsm8k.lock.json --address auto
    """
    from crucible import session

    if (repo is None) == (lock is None):
        raise click.UsageError("give REPO, or --lock FILE, and not both")
    with Watch(repo or str(lock), quiet=quiet) as watch:
        if repo is not None:
            report = session.prefetch(repo, **request, on_progress=watch.update)
        else:
            how = {name: request.pop(name) for name in ("replicas", "address", "nodes", "keep_raw", "endpoint")}
            if given := [name for name, value in request.items() if value]:
                raise click.UsageError(f"--lock says what is prefetched: leave out --{given[0].replace('_', '-')}")
            report = session.prefetch_locked(str(lock), **how, on_progress=watch.update)
    if as_json:
        print_json(as_dict(report))
    else:
        show(report)
    for note in () if quiet else report.notes:
        click.echo(f"Note: {note}", err=True)


def as_dict(report: JobReport) -> dict[str, Any]:
    """The report with its sums, as docs/cli.md names them."""
    nodes = [{"node": node, "shards": shards, "bytes": size} for node, shards, size in report.nodes]
    return {
        **asdict(report),
        "rows": report.rows,
        "source_bytes": report.source_bytes,
        "requests": report.counts.requests,
        "hub_ratio": ratio(report),
        "nodes": nodes,
    }


def ratio(report: JobReport) -> float | None:
    """Bytes from the Hub over bytes of the repo's files: 1.0 when each left the Hub once. None for no bytes."""
    return round(report.counts.hub_bytes / report.source_bytes, 4) if report.source_bytes else None


def show(report: JobReport) -> None:
    counts = report.counts
    shards, size = sum(split.shards for split in report.splits), sum(split.size for split in report.splits)
    facts = [
        ("job", report.job),
        ("data", f"{report.repo}@{report.commit[:12]}, config {report.config}"),
        ("checked", "by length and structure only: ranges of columns" if report.partial else ""),
        ("rows", ", ".join(f"{split.split} {split.rows:,}" for split in report.splits)),
        ("shards", f"{shards:,}, {human(size)}"),
        ("from the Hub", _from_hub(report)),
        ("from this disk", human(counts.local_bytes) if counts.local_bytes else ""),
        ("from the Hub cache", human(counts.cached_bytes) if counts.cached_bytes else ""),
        ("from peers", human(counts.peer_bytes) if counts.peer_bytes else ""),
        ("requests", f"{counts.requests:,} to the Hub" if counts.requests else ""),
        ("retries", f"{counts.retries:,}" if counts.retries else ""),
        ("replicas", f"{report.copies:,} made" if report.copies else ""),
        ("in the stores", f"{count(report.reused_items, 'item')} already" if report.reused_items else ""),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    print_facts((name, value) for name, value in facts if value)
    if report.nodes:
        click.echo()
        print_table(("node", "shards", "bytes"), [(node[:16], f"{n:,}", human(b)) for node, n, b in report.nodes])


def _from_hub(report: JobReport) -> str:
    """Empty for a repo that is a folder: nothing could have come from the Hub."""
    hub = ratio(report)
    if report.counts.local_bytes or hub is None:
        return ""
    return f"{human(report.counts.hub_bytes)} of {human(report.source_bytes)} ({hub:.2f}x)"
