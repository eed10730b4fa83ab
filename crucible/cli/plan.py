"""`crucible plan`: what a prefetch would move and what each rank would read, before anything moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import options
from crucible.cli.show import count, human, print_facts, print_json, print_table

if TYPE_CHECKING:
    from crucible.cluster.plan import NodePlan, Plan

_ROWS_FROM = {
    "manifest": "exact, from the manifest in this node's store",
    "footers": "exact, from the parquet footers",
    "card": "as the dataset card says; exact once converted",
}


@click.command("plan")
@options.data
@options.columns
@options.partial
@options.replicas
@click.option(
    "--nodes", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Nodes to plan for."
)
@click.option(
    "--ranks-per-node",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Training processes on each.",
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of one rank in a step."
)
@options.as_json
def command(as_json: bool, **request: Any) -> None:
    """Show what a prefetch of REPO on cold nodes would move. Moves no data.

    Files, bytes from the Hub and requests are exact when nothing fails on the way. Bytes of shards nobody has made yet
    are estimates, marked ~.

    \b
    Example:
      crucible plan openai/gsm8k --config main --nodes 2 --batch 32
    """
    from crucible import session

    made = session.plan(**request)
    if as_json:
        print_json(as_dict(made))
    else:
        show(made)


def as_dict(plan: Plan) -> dict[str, Any]:
    return {**asdict(plan), "ranks": [{"rows": rows, "steps": steps} for rows, steps in plan.ranks]}


def show(plan: Plan) -> None:
    about = "" if plan.cached else "~"
    click.echo(f"{plan.repo}@{plan.commit[:12]}, config {plan.config}, {' + '.join(plan.splits)}\n")
    head = ("node", "from Hub", "from peers", "from disk", "requests", "peak disk")
    lines = [_line(str(node.node), [node], about) for node in plan.nodes]
    if len(lines) > 1:
        lines.append(_line("all", plan.nodes, about))
    print_table(head, lines, total=len(plan.nodes) > 1)
    click.echo()
    print_facts(
        [
            ("files", f"{plan.files:,}, {human(plan.source_bytes)}" + (", all converted here already" * plan.cached)),
            *([("checked", "by length and structure only: ranges of columns come")] if plan.partial else ()),
            ("requests", f"{plan.requests:,} to the Hub, listing and card included"),
            (
                "rows",
                "not known before conversion" if plan.rows is None else f"{plan.rows:,} ({_ROWS_FROM[plan.rows_from]})",
            ),
            *(("ranks" if first else "", line) for first, line in _first(rank_lines(plan.ranks, plan.batch))),
        ]
    )


def _line(name: str, nodes: Sequence[NodePlan], about: str) -> tuple[str, ...]:
    """One row of the table: the sums over `nodes`; for the peak the biggest."""
    return (
        name,
        human(sum(node.hub_bytes for node in nodes)),
        _estimate(sum(node.peer_bytes for node in nodes), about),
        _estimate(sum(node.disk_bytes for node in nodes), about),
        f"{sum(node.requests for node in nodes):,}",
        _estimate(max(node.peak_disk_bytes for node in nodes), about),
    )


def _estimate(size: int, about: str) -> str:
    return f"{about}{human(size)}" if size else human(0)


def rank_lines(ranks: Sequence[tuple[int, int]], batch: int) -> Iterator[str]:
    """Ranks that read alike, together: `0-6: 935 rows, 30 steps of 32`."""
    start = 0
    for (rows, steps), alike in groupby(ranks):
        end = start + len(list(alike))
        who = str(start) if end - start == 1 else f"{start}-{end - 1}"
        yield f"{who}: {count(rows, 'row')}, {count(steps, 'step')} of {batch}"
        start = end


def _first(lines: Iterable[str]) -> Iterator[tuple[bool, str]]:
    for number, line in enumerate(lines):
        yield number == 0, line
