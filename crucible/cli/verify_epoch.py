"""`crucible verify-epoch`: prove from the records of a training that each row was delivered once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import options
from crucible.cli.show import print_json

if TYPE_CHECKING:
    from crucible.certificate import Finding
    from crucible.proof import Verdict


@click.command("verify-epoch")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--epoch", type=click.IntRange(min=0), help="Only this epoch.")
@options.as_json
@click.pass_context
def command(ctx: click.Context, paths: tuple[Path, ...], epoch: int | None, as_json: bool) -> None:
    """Prove that an epoch was delivered exactly once.

    Or name the loss: which rank lacks how many rows, and which one it was.

    PATH is a folder that datasets were told to keep their records in
    (`ds.certify(folder)`, or CRUCIBLE_CERTIFICATES), or one record in it; from
    several nodes, the folder of each. Exits with 1 when an epoch is not
    proven. With --json one object an epoch.

    \b
    Example:
      crucible verify-epoch /shared/run-17/records --epoch 2
    """
    from crucible.errors import UsageError
    from crucible.proof import epochs_of, read_plan, read_records, verdict

    records = [one for one in read_records(paths) if epoch is None or one.epoch == epoch]
    if not records:
        raise UsageError(f"no records of {'any epoch' if epoch is None else f'epoch {epoch}'} in {paths[0]}")
    proven = True
    for group in epochs_of(records):
        found = verdict(group, lambda record: read_plan(paths, record))
        proven = proven and found.proven
        if as_json:
            print_json(_told(found))
        else:
            _show(found)
    ctx.exit(0 if proven else 1)


def _show(found: Verdict) -> None:
    said = "every row delivered exactly once" if found.proven else "NOT PROVEN"
    click.echo(f"{found.dataset}, epoch {found.epoch}: {found.total:,} rows, {said}")
    for start, stop, ranks in found.spans:
        click.echo(f"  positions {start:,} to {stop:,} by {ranks} rank{'' if ranks == 1 else 's'}")
    for name in ("filtered", "skipped", "padded"):
        if count := getattr(found, name):
            click.echo(f"  {count:,} rows {_NAMED[name]}")
    for start, stop, rank, worker in found.missing:
        who = "nobody" if rank < 0 else f"rank {rank}, worker {worker}"
        click.echo(f"  positions {start:,} to {stop:,}: no record of {who}")
    for one in found.findings:
        click.echo(f"  {one.record.who}, from position {one.record.share.start:,}: {'; '.join(_wrong(one))}")


_NAMED = {
    "filtered": "left out by filters",
    "skipped": "left out because they could not be decoded",
    "padded": "handed out twice as padding",
}


def _wrong(one: Finding) -> list[str]:
    said = []
    if one.short:
        said.append(f"its record ends {one.short:,} batches (or rows) before the point from which the next run went on")
    if one.lost:
        said.append(f"lost row {', '.join(f'{row:,}' for row in one.lost)}")
    if one.again:
        said.append(f"handed out row {', '.join(f'{row:,}' for row in one.again)}, which was not its turn")
    if one.lacking:
        said.append(f"{abs(one.lacking):,} rows too {'few' if one.lacking > 0 else 'many'}")
    if not one.matches and not said:
        said.append(f"other rows than its own {one.record.sum.rows:,}")
    return said


def _told(found: Verdict) -> dict[str, Any]:
    return {
        "dataset": found.dataset,
        "identity": found.identity,
        "epoch": found.epoch,
        "rows": found.total,
        "proven": found.proven,
        "spans": [{"start": start, "stop": stop, "ranks": ranks} for start, stop, ranks in found.spans],
        "filtered": found.filtered,
        "skipped": found.skipped,
        "padded": found.padded,
        "missing": [
            {"start": start, "stop": stop, "rank": rank, "worker": worker}
            for start, stop, rank, worker in found.missing
        ],
        "wrong": [
            {
                "rank": one.record.share.rank,
                "worker": one.record.share.worker,
                "start": one.record.share.start,
                "units_short": one.short,
                "rows_lacking": one.lacking,
                "lost": list(one.lost),
                "not_its_turn": list(one.again),
            }
            for one in found.findings
        ],
    }
