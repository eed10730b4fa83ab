"""`crucible export`: what was prefetched, as a folder or a tar that another cluster imports."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import options
from crucible.cli.progress import Watch
from crucible.cli.show import count, human, print_facts, print_json

if TYPE_CHECKING:
    from crucible.bundle import BundleReport


@click.command("export")
@options.data
@options.columns
@options.partial
@click.option("--out", metavar="PATH", required=True, help="A folder, a name in .tar, or - for a tar on stdout.")
@click.option("--raw", is_flag=True, help="The source files too, for the Hub cache of the other side.")
@click.option("--lock-only", is_flag=True, help="The lock file alone.")
@options.as_json
@options.quiet
def command(out: str, raw: bool, lock_only: bool, as_json: bool, quiet: bool, **request: Any) -> None:
    """Write what was prefetched of REPO as a bundle.

    A bundle, for a cluster that reaches no Hub, is a lock file (commit, recipes, digests of every source file and
    shard) and the shards. Where this node lacks shards, they come from its peers. An interrupted export into a folder
    is continued by the same command. Of a slice the whole split is exported. The same data gives the same bytes.

    \b
    Example:
      crucible export openai/gsm8k --config main --out gsm8k.tar
      crucible export openai/gsm8k --out - | ssh inside crucible import -
    """
    from crucible.cluster.bundles import export_bundle

    if out == "-" and as_json:
        raise click.UsageError("--json writes to stdout, and so does --out -: leave one of them out")
    with Watch(request["repo"], quiet=quiet) as watch:
        report = export_bundle(**request, out=out, raw=raw, lock_only=lock_only, on_progress=watch.update)
    if as_json:
        print_json(as_dict(report))
    elif out != "-":
        show(report)


def as_dict(report: BundleReport) -> dict[str, Any]:
    """The report as docs/cli.md names it."""
    splits = [{"split": split, "manifest": manifest, "rows": rows} for split, manifest, rows in report.splits]
    return {**asdict(report), "splits": splits}


def show(report: BundleReport) -> None:
    facts = [
        ("bundle", report.bundle),
        ("lock", report.lock),
        ("data", f"{report.repo}@{report.commit[:12]}, config {report.config}"),
        ("rows", ", ".join(f"{split} {rows:,}" for split, _, rows in report.splits)),
        ("shards", f"{report.shards:,}, {human(report.bytes)}" + (" with the source files" if report.files else "")),
        ("source files", f"{report.files:,}" if report.files else ""),
        ("there already", count(report.reused, "file") if report.reused else ""),
    ]
    print_facts((name, value) for name, value in facts if value)
