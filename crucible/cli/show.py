"""How numbers, tables and JSON look. stdout is for results; stderr is for everything else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

from crucible.printable import printable, printable_json


def print_json(value: Any) -> None:
    """One object on one line."""
    click.echo(printable_json(json.dumps(value, ensure_ascii=False, allow_nan=False)))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, total: bool = False) -> None:
    """A table as wide as the terminal at most; the first `left` columns align left, the others are numbers.

    `total` sets the last row off.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        if number < left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    lines = list(rows)
    for number, line in enumerate(lines):
        table.add_row(*map(printable, line), end_section=total and number == len(lines) - 2)
    Console(highlight=False, markup=False).print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """`name  value` lines, the values in one column."""
    known = list(facts)
    width = max(len(name) for name, _ in known)
    for name, value in known:
        click.echo(printable(f"{name:<{width}}  {value}"))


def human(size: int) -> str:
    """Bytes as a person reads them, in powers of 1024: `0 B`, `812 B`, `44.7 MiB`."""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1023.95 or unit == "PiB":
            break
        amount /= 1024
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"


def count(number: int, noun: str, many: str = "") -> str:
    """`1 shard`, `7,473 rows`; `many` where more than one is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"
