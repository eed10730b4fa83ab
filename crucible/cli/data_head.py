"""`crucible data head`: the first rows of a split, as a person or a script reads them."""

from __future__ import annotations

import math
from datetime import date, time
from itertools import islice
from typing import Any

import click

from crucible.cli import options
from crucible.cli.progress import Watch
from crucible.cli.show import print_json
from crucible.printable import printable

_LONGEST = 200
"""Characters of a value that are shown; `--json` gives it whole."""


@click.command("head")
@options.repo
@options.config
@click.option("--split", metavar="SPLIT", default="train", show_default=True, help="Split, slice or sum of these.")
@options.reading
@options.columns
@options.partial
@click.option(
    "-n", "count", metavar="N", type=click.IntRange(min=0), default=5, show_default=True, help="How many rows."
)
@options.as_json
@options.quiet
def command(count: int, as_json: bool, quiet: bool, repo: str, config: str | None, **request: Any) -> None:
    """Print the first rows of a split of REPO.

    What is not in this node's store yet is downloaded and converted first, the whole split. Long values are cut, images
    and bytes are described. With --json one row a line, values whole.

    \b
    Example:
      crucible data head openai/gsm8k --config main -n 3
      crucible data head uoft-cs/cifar10 --split 'test[-5:]' --json
    """
    from crucible import session

    with Watch(repo, quiet=quiet, first="reading"):
        rows = readable(session.load_dataset(repo, config, streaming=True, **request))
        first = list(islice(rows, count))
    for number, row in enumerate(first):
        if as_json:
            print_json({name: for_json(value) for name, value in row.items()})
        else:
            show(number, row)


def readable(rows: Any) -> Any:
    """The same rows with audio as the bytes it is, where it would have to be decoded."""
    from crucible.decode import without_decoding

    for name, feature in rows.features.to_dict().items():
        if (carried := without_decoding(feature, ("Audio",))) != feature:
            rows = rows.cast_column(name, carried)
    return rows


def show(number: int, row: dict[str, Any]) -> None:
    click.echo(f"row {number}")
    width = max((len(name) for name in row), default=0)
    for name, value in row.items():
        click.echo(printable(f"  {name:<{width}}  {for_person(value)}"))


def for_person(value: Any) -> str:
    """One line, cut where it is long; line ends and control characters are shown as escapes."""
    text = repr(_describe(value))
    if isinstance(value, str):
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


class _Described:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _describe(value: Any) -> Any:
    """The same value with what is not text or number replaced by a short description."""
    if isinstance(value, dict):
        return {name: _describe(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(inner) for inner in value]
    if isinstance(value, bytes):
        return _Described(f"<{len(value):,} bytes>")
    if _is_image(value):
        return _Described(f"<PIL image {value.width}x{value.height} {value.mode}>")
    return value


def for_json(value: Any) -> Any:
    """What JSON can hold: images by size and mode, bytes by their number, dates in ISO form, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(name): for_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return {"bytes": len(value)}
    if isinstance(value, (date, time)):
        return value.isoformat()
    if _is_image(value):
        return {"width": value.width, "height": value.height, "mode": value.mode}
    return str(value)


def _is_image(value: Any) -> bool:
    """By its shape and not by its class: Pillow is imported by whoever decoded it, and by nobody else."""
    return all(hasattr(value, name) for name in ("width", "height", "mode", "getbands"))
