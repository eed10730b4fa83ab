"""`crucible data schema`: columns and features of a dataset."""

from __future__ import annotations

from typing import Any

import click

from crucible.cli import options
from crucible.cli.progress import Watch
from crucible.cli.show import count, human, print_json, print_table

_LONGEST = 100
"""Characters of a feature that are shown; `--json` gives it whole."""


@click.command("schema")
@options.data
@options.columns
@options.partial
@options.as_json
@options.quiet
def command(as_json: bool, quiet: bool, repo: str, config: str | None, **request: Any) -> None:
    """Print the columns of REPO and their features.

    What is not in this node's store yet is downloaded and converted first. With --json one split a line.

    \b
    Example:
      crucible data schema openai/gsm8k --config main
      crucible data schema uoft-cs/cifar10 --json | jq .features.label.names
    """
    with Watch(repo, quiet=quiet, first="reading"):
        found = splits(repo, config, request)
    for dataset in found:
        manifest = dataset.manifest
        types = {field.name: str(field.type) for field in dataset.features.arrow_schema}
        if as_json:
            told = {"repo": repo, "commit": manifest.repo.revision, "config": manifest.config, "split": manifest.split}
            told |= {"rows": dataset.num_rows, "bytes": manifest.size, "shards": len(manifest.shards)}
            told["partial"] = manifest.partial
            print_json({**told, "features": dataset.features.to_dict(), "types": types})
        else:
            size = f"{count(dataset.num_rows, 'row')}, {human(manifest.size)}"
            shards = count(len(manifest.shards), "shard") + (", partial" if manifest.partial else "")
            click.echo(f"{manifest.config}, {manifest.split}: {size} in {shards}")
            lines = [(name, _short(feature), _short(types[name])) for name, feature in dataset.features.items()]
            print_table(("column", "feature", "Arrow type"), lines, left=3)


def splits(repo: str, config: str | None, request: dict[str, Any]) -> list[Any]:
    """The mapped splits that a command is about: the one that was asked for, or all."""
    from crucible import session

    found = session.load_dataset(repo, config, **request)
    return list(found.values()) if isinstance(found, dict) else [found]


def _short(value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
