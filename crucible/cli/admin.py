"""What the commands of an admin share: what is meant, whether to go ahead, how an operation is shown."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from crucible.cli import options
from crucible.cli.interrupt import raise_if_asked
from crucible.cli.show import count, human, print_json
from crucible.errors import UsageError

yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
limit = click.option(
    "--limit", metavar="N", type=click.IntRange(min=0), default=20, show_default=True, help="Lines shown; 0: all."
)
_VERBS = {"copies": "to copy", "remakes": "to make again", "drops": "to drop"}
EVERY_S = 10.0
"""Between two lines about an operation where there is no terminal."""


def choice(*, required: bool = False) -> Callable[[Any], Any]:
    """[TARGET] --config --split --revision as one argument `chosen`: which manifests are meant."""

    def decorated(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)  # with the options that it has already
        def chosen(target: str | None, config: str | None, split: str | None, revision: str | None, **rest: Any) -> Any:
            from crucible.cluster.ledger import Choice

            return command(chosen=Choice(target or "", config or "", split or "", revision or ""), **rest)

        made: Any = chosen
        for option in (
            click.option("--revision", metavar="COMMIT", help="Only this commit, or those that begin so."),
            click.option("--split", metavar="SPLIT", help="Only this split."),
            options.config,
            click.argument("target", required=required),
        ):
            made = option(made)
        return made

    return decorated


def go_ahead(question: str, said_yes: bool, *, look: str = ", or --dry-run to look") -> None:
    """Ask, unless it was said already. Raises UsageError where nobody can be asked; `look` is what else can be done."""
    if said_yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here: give -y to go ahead{look}")
    click.confirm(question, abort=True, err=True)


def progress(quiet: bool) -> Callable[[Mapping[str, Any]], None]:
    """What shows an operation on stderr: one line that is written over in a terminal, else one now and then."""
    if quiet:
        return lambda _: raise_if_asked()
    terminal = sys.stderr.isatty()
    shown = [time.monotonic() if not terminal else 0.0]

    def show(told: Mapping[str, Any]) -> None:
        raise_if_asked()
        over = told["phase"] in ("done", "cancelled", "failed")
        if not terminal and time.monotonic() - shown[0] < EVERY_S:
            return
        shown[0] = time.monotonic()
        done = told["copied"] + told["remade"] + told["dropped"]
        whole = told["copies"] + told["remakes"] + told["drops"]
        line = f"{told['kind']}: {told['phase']}, {done:,} of {whole:,}, {human(told['bytes_done'])}"
        if told["waiting_for"]:
            line = f"{told['kind']}: waits for {told['waiting_for']}"
        if terminal:
            click.echo("\r\x1b[K" + ("" if over else line[:79]), nl=False, err=True)
        else:
            click.echo(line, err=True)

    return show


def show_operation(told: Mapping[str, Any], as_json: bool) -> None:
    """What an operation did, or would do. Ends the command with 1 where shards are not as they should be."""
    if as_json:
        print_json(dict(told))
    elif told["phase"] == "planned":
        plan = [f"{count(told[name], 'shard')} {verb}" for name, verb in _VERBS.items() if told[name]]
        click.echo("nothing to do" if not plan else f"{', '.join(plan)}; {human(told['bytes'])} to move")
    else:
        did = {"copied": told["copied"], "made again": told["remade"], "dropped": told["dropped"]}
        done = [f"{count(number, 'shard')} {verb}" for verb, number in did.items() if number]
        took = f"{human(told['bytes_done'])} in {told['seconds']:.1f} s"
        click.echo("nothing to do" if not done else f"{', '.join(done)}; {took}")
    for problem in told["problems"]:
        click.echo(problem, err=True)
    if told["moved"]:
        click.echo(f"{count(told['moved'], 'task')} ended there when the grace was over; others do that work", err=True)
    if told["phase"] == "planned":
        return
    if told["left"]:
        click.echo(f"{count(told['left'], 'shard')} left that should be on more nodes", err=True)
    if told["left"] or told["phase"] != "done":
        raise click.exceptions.Exit(1)


def show_problems(problems: Mapping[str, str]) -> None:
    """Nodes that did not do what they were told. Ends the command with 1 if there are any."""
    for node, problem in problems.items():
        click.echo(f"node {node[:12]}: {problem}", err=True)
    if problems:
        raise click.exceptions.Exit(1)
