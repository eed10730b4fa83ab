"""What a person sees on stderr while a command works: bars in a terminal, a line at start and end elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from crucible.cli.interrupt import raise_if_asked
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
        self._wait: tuple[float, str] = (0.0, "")
        """(monotonic time, what for) of the wait that the last progress told of."""
        self._announced = 0.0

    def __enter__(self) -> Watch:
        if self._quiet:
            return self
        if not sys.stderr.isatty():
            click.echo(f"{self._what}: started", err=True)
            return self
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        watch = self

        # rendered ten times a second whether or not anything is reported, so that a countdown counts down
        class Doing(TextColumn):
            def render(self, task: Any) -> Text:
                waiting = watch.waiting()
                return Text(waiting) if waiting else super().render(task)

        class Amount(TextColumn):
            def render(self, task: Any) -> Text:
                return Text("") if watch.waiting() else super().render(task)

        class Bar(BarColumn):
            def render(self, task: Any) -> ProgressBar:
                bar = super().render(task)
                bar.width = 1 if watch.waiting() else bar.width
                return bar

        self._bar = Bars(
            SpinnerColumn(),
            Doing("{task.description}", markup=False),
            Bar(bar_width=12),
            Amount("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(f"{self._short}: {self._first}", total=None, amount="")
        return self

    def update(self, progress: Progress) -> None:
        """Show how far the job is. Called a few times a second."""
        raise_if_asked()
        self._wait = (time.monotonic() + progress.waiting_s, progress.waiting_for)
        if self._bar is None:
            self._announce()
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

    def waiting(self) -> str:
        """What the Hub asked to be spared, with the seconds that are left of it; empty when nobody waits."""
        from crucible.hub.governor import DESK

        until, what = self._wait
        here = DESK.waiting()  # of a command that works in this process and reports nothing
        if here is not None and here.until > until:
            until, what = here.until, f"{here.bucket}, {here.reason}"
        left = math.ceil(until - time.monotonic())
        return f"Hub asks to wait: {left} s ({what})" if left > 0 else ""

    def _announce(self) -> None:
        """Where nothing can count down, say once how long each wait is."""
        waiting = "" if self._quiet else self.waiting()
        if waiting and self._wait[0] > self._announced + 1:
            self._announced = self._wait[0]
            click.echo(f"{self._what}: {waiting}", err=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet and kind is None:
            click.echo(f"{self._what}: done in {time.monotonic() - self._began:.1f} s", err=True)
