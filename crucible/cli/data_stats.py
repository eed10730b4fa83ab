"""`crucible data stats`: what is in the columns of a dataset."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from crucible.cli import options
from crucible.cli.data_head import for_json
from crucible.cli.data_schema import splits
from crucible.cli.progress import Watch
from crucible.cli.show import count, human, print_json, print_table

if TYPE_CHECKING:
    from crucible.stats import ColumnStats


@click.command("stats")
@options.data
@options.columns
@options.partial
@options.as_json
@options.quiet
def command(as_json: bool, quiet: bool, repo: str, config: str | None, **request: Any) -> None:
    """Print what is in the columns of REPO.

    Rows, bytes, nulls, smallest and largest values, lengths and labels. What is not in this node's store yet is
    downloaded and converted first; then every row is read once. With --json one column a line.

    \b
    Example:
      crucible data stats openai/gsm8k --config main --split train
      crucible data stats uoft-cs/cifar10 --columns label --json | jq .labels
    """
    from crucible.stats import column_stats

    with Watch(repo, quiet=quiet, first="reading"):
        found = [(one, column_stats(one.tables(), one.features.to_dict())) for one in splits(repo, config, request)]
    for dataset, columns in found:
        split = dataset.manifest.split
        if as_json:
            for column in columns:
                print_json({"split": split, **{name: for_json(value) for name, value in asdict(column).items()}})
        else:
            size = f"{count(dataset.num_rows, 'row')}, {human(dataset.manifest.size)}"
            click.echo(f"{dataset.manifest.config}, {split}: {size}")
            head = ("column", "feature", "values", "nulls", "bytes", "mean", "lengths")
            print_table(head, [_line(column) for column in columns], left=3)


def _line(column: ColumnStats) -> tuple[str, ...]:
    values = "" if column.min is None else f"{_number(column.min)} to {_number(column.max)}"
    if column.labels:
        most = sorted(column.labels.items(), key=lambda label: -label[1])
        values = ", ".join(f"{name} {number:,}" for name, number in most[:3]) + (", …" if len(most) > 3 else "")
    if column.not_finite:
        values += f", {column.not_finite:,} not finite"
    lengths = (
        ""
        if column.mean_length is None
        else f"{column.min_length:,} to {column.max_length:,}, ∅ {column.mean_length:,.1f}"
    )
    mean = "" if column.mean is None else _number(column.mean)
    return column.column, column.feature, values, f"{column.nulls:,}", human(column.bytes), mean, lengths


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
