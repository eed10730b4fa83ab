"""`crucible hub pull`: a repo's files into the Hub cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import options
from crucible.cli.progress import Watch
from crucible.cli.show import count, human, print_json

if TYPE_CHECKING:
    from crucible.workers.pull import PullReport


@click.command("pull")
@options.repo
@click.option(
    "--type",
    "repo_type",
    type=click.Choice(["dataset", "model", "space"]),
    default="dataset",
    show_default=True,
    help="What REPO is.",
)
@options.revision
@click.option("--include", metavar="GLOB", multiple=True, help="Only paths that match this; repeatable.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="No path that matches this; repeatable.")
@click.option(
    "--cache-dir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Another cache than HF_HUB_CACHE says.",
)
@click.option("--verify", is_flag=True, help="Hash what is there already too; replace what is wrong.")
@options.endpoint
@options.as_json
@options.quiet
def command(repo: str, as_json: bool, quiet: bool, **request: Any) -> None:
    """Bring the files of REPO into the Hub cache, and print where.

    The cache is the one that huggingface_hub uses: what either brings, both find. Each file is verified while it
    arrives. A file that fails is named and the others are kept; the same command goes on from there.

    \b
    Example:
      crucible hub pull openai/gsm8k
      crucible hub pull openai-community/gpt2 --type model --include "*.json"
    """
    from crucible import session

    with Watch(repo, quiet=quiet) as watch:
        report = session.pull(repo, **request, on_progress=watch.update)
    if as_json:
        print_json(as_dict(report))
    else:
        click.echo(report.path)
    if not quiet:
        click.echo(told(report), err=True)


def as_dict(report: PullReport) -> dict[str, Any]:
    """The report with its sum, as docs/cli.md names them."""
    return {**asdict(report), "requests": report.counts.requests}


def told(report: PullReport) -> str:
    """One line: what was wanted, what was here, what came."""
    new = report.files - report.reused_files
    parts = [f"{count(report.files, 'file')}, {human(report.size)}"]
    if report.reused_files:
        parts.append(f"{report.reused_files:,} here already")
    if new:
        parts.append(f"{new:,} fetched ({human(report.counts.hub_bytes)})")
    if report.replaced:
        parts.append(f"{len(report.replaced):,} of them because they were wrong here: {', '.join(report.replaced[:5])}")
    if not report.listed:
        parts.append("no listing is here, so nobody knows whether that is all")
    return f"{report.repo}@{report.commit[:12]}: {'; '.join(parts)}; {count(report.counts.requests, 'request')}"
