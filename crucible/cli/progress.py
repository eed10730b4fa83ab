"""What a person sees on stderr while a command works: bars in a terminal, a line at start and end elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from crucible.cli.show import human

if TYPE_CHECKING:
    from crucible.report import Progress

_PHASES = {"resolve": "listing files", "items": "downloading", "copies": "copying"}
_NAME_CHARS = 18
"""Of the name, so that the numbers beside it fit 80 columns."""


class Watch:
    """`with Watch("gsm8k", quiet=False) as watch: work(on_progress=watch.update)`.

    Writes to stderr only. Leaves the bar's place empty when the work is done, so that results stand alone.
    """

    def __init__(self, what: str, *, quiet: bool, first: str = "starting") -> None:
        self._what, self._quiet, self._first = what, quiet, first
        self._short = what.rstrip("/").rpartition("/")[2]
        if len(self._short) > _NAME_CHARS:
            self._short = self._short[: _NAME_CHARS - 1] + "…"
        self._bar: Any = None
        self._task: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> Watch:
        if self._quiet:
            return self
        if not sys.stderr.isatty():
            click.echo(f"{self._what}: started", err=True)
            return self
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bar = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(f"{self._short}: {self._first}", total=None, amount="")
        return self

    def update(self, progress: Progress) -> None:
        """Show how far the job is. Called a few times a second."""
        if self._bar is None:
            return
        phase = _PHASES.get(progress.phase, progress.phase)
        amount = f"{human(progress.bytes_done)} of {human(progress.bytes)}, {progress.items_done}/{progress.items}"
        retries = f", {progress.retries} retried" if progress.retries else ""
        self._bar.update(
            self._task,
            description=f"{self._short}: {phase}",
            total=progress.bytes or None,
            completed=progress.bytes_done,
            amount=f"{amount}{retries}" if progress.items else "",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet and kind is None:
            click.echo(f"{self._what}: done in {time.monotonic() - self._began:.1f} s", err=True)
