"""`crucible verify`: are the shards what they should be?"""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import admin, options
from crucible.cli.show import count, human, print_json, print_table


@click.command("verify")
@admin.choice()
@click.option("--deep", is_flag=True, help="Read every shard and compare its digest.")
@click.option(
    "--repair", "mend", is_flag=True, help="Bring what is wrong anew: from another node, else from its source."
)
@click.option("--bundle", metavar="PATH", help="Check this bundle in place of a store, every byte of it; - is stdin.")
@admin.limit
@options.address
@options.quiet
@options.as_json
def command(
    chosen: Any,
    deep: bool,
    mend: bool,
    bundle: str | None,
    limit: int,
    address: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Look whether the shards are what they should be.

    That they are there, have the right length and, with --deep, the right bytes. TARGET is a repo or the beginning
    of a manifest's id; all without it. With --address or RAY_ADDRESS all nodes of that cluster look at their
    stores, else this node at its own. A wrong shard is put into quarantine. Ends with 1 if something is wrong and
    left.

    \b
    Example:
      crucible verify
      crucible verify openai/gsm8k --deep --repair --address auto
      crucible verify --bundle gsm8k.tar
    """
    if bundle is not None:
        if chosen or deep or mend or address:
            raise click.UsageError("--bundle looks at that bundle alone: leave TARGET and the other options out")
        _bundle(bundle, quiet=quiet, as_json=as_json)
        return
    from crucible.cluster import manage

    told = manage.verify(chosen, deep=deep, mend=mend, address=address, on_progress=admin.progress(quiet))
    found = told["findings"]
    if as_json:
        print_json(told)
    else:
        if found:
            shown = found[: limit or None]
            lines = [
                (
                    one["node"][:8],
                    one["kind"],
                    one["key"][:12],
                    f"{one['found'][:20]}, not {one['expected'][:20]}" if one["expected"] else one["found"],
                )
                for one in shown
            ]
            print_table(("node", "what", "key", "found"), lines, left=4)
            if len(shown) < len(found):
                click.echo(f"and {len(found) - len(shown):,} more; --limit 0 shows all")
        how = "read" if deep else "looked at"
        wrong = sum(one["kind"] in manage.WRONG for one in found)
        also = f"; {count(len(found) - wrong, 'thing')} noted" if len(found) > wrong else ""
        click.echo(
            f"{count(told['checked'], 'shard')} {how} ({human(told['bytes'])}), {wrong:,} found wrong or lost{also}"
        )
    for problem in told["problems"]:
        click.echo(problem, err=True)
    if told["left"] or told["problems"]:
        if told["left"]:
            again = "" if mend else "; --repair brings them anew"
            click.echo(f"{count(told['left'], 'shard')} wrong, or on too few nodes{again}", err=True)
        raise click.exceptions.Exit(1)


def _bundle(path: str, *, quiet: bool, as_json: bool) -> None:
    from crucible.bundle import verify
    from crucible.cli import export
    from crucible.cli.progress import Watch

    with Watch(path, quiet=quiet) as watch:
        report = verify(path, watch.update)
    if as_json:
        print_json(export.as_dict(report))
    else:
        export.show(report)
