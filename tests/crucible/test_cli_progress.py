"""The progress bar and the countdown, as a terminal shows them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from tests.hubserver.faults import FaultyHub


def test_a_bar_is_drawn_in_a_terminal_only_and_leaves_stdout_alone(data: FaultyHub) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "crucible", "data", "head", "org/toy", "--config", "a", "-n", "1", "--json"]
    child = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, text=True, timeout=60, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # how a pty whose other end is closed says that it is at its end
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    assert json.loads(child.stdout) == {"n": 0, "text": "row 0"}
    assert "toy: reading" in drawn.decode()


def test_a_bar_shows_bytes_and_items_and_cuts_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from crucible.cli.progress import Watch
    from crucible.report import Progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    screen = Console(width=80, force_terminal=True, record=True, file=io.StringIO())
    monkeypatch.setattr("rich.console.Console", lambda **_: screen)
    with Watch("org/a-rather-long-name-of-a-dataset", quiet=False) as watch:
        watch.update(Progress("job", "items", 3, 8, 3 << 20, 8 << 20, retries=2))
    shown = screen.export_text()
    assert "a-rather-long-nam…: downloading" in shown
    assert "3.0 MiB of 8.0 MiB, 3/8, 2 retried" in shown


def test_a_wait_that_the_hub_asked_for_counts_down_and_gives_way_to_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from crucible.cli.progress import Watch
    from crucible.report import Progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    screen = Console(width=80, force_terminal=True, record=True, file=io.StringIO())
    monkeypatch.setattr("rich.console.Console", lambda **_: screen)
    waiting = Progress("job", "items", 3, 8, 3 << 20, 8 << 20, waiting_s=2.9, waiting_for="resolvers, 0 of 3000 left")
    with Watch("org/a-rather-long-name-of-a-dataset", quiet=False) as watch:
        watch.update(waiting)
        end = time.monotonic() + 20
        while watch.waiting():  # nothing more is reported: it counts down by itself
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
    shown = screen.export_text()
    seen = [int(left) for left in re.findall(r"Hub asks to wait: (\d) s \(resolvers, 0 of 3000 left\)", shown)]
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) >= 2, "it ticks"
    assert shown.rfind("Hub asks") < shown.rfind("3.0 MiB of 8.0 MiB, 3/8")


def test_where_nothing_can_count_down_each_wait_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    from crucible.cli.progress import Watch
    from crucible.report import Progress

    progress = Progress("job", "items", 3, 8)
    with Watch("org/toy", quiet=False) as watch:
        for left in (0.0, 42.0, 41.8, 0.0, 90.0):
            watch.update(dataclasses.replace(progress, waiting_s=left, waiting_for="api, 0 of 500 left"))
    said = [line for line in capsys.readouterr().err.splitlines() if "wait" in line]
    assert said == [f"org/toy: Hub asks to wait: {left} s (api, 0 of 500 left)" for left in (42, 90)]


def test_a_command_that_works_here_shows_the_wait_in_a_terminal(data: FaultyHub) -> None:
    """`data head` reports no progress, and a person sees all the same why nothing happens."""
    data.add("429", path="/api/*", wait=2)
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-m", "crucible", "data", "head", "org/toy", "--config", "a", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment) as child:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal ends with its last writer
            while piece := os.read(master, 4096):
                shown += piece
        os.close(master)
        assert child.wait(30) == 0
    seen = [int(left) for left in re.findall(rb"Hub asks to wait: (\d+) s \(api, 0 of 500 left\)", shown)]
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) >= 2, "it ticks"
