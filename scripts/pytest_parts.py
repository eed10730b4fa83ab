"""How `scripts/test` runs the suite: tests that need a quiet machine come last and alone; what was left out is said.

One pytest, so that there is one summary. Three processes share the test files. At the end of the queue come two
units of work, with a Ray cluster each: everything under `tests/ray`, and everything under `tests/chaos` and
`tests/netns`. They run beside each other, as for half of the time each waits for something to be noticed as dead; with
more at once on two cores they would starve each other and then time out.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

UNITS = {"tests/ray/": "ray", "tests/chaos/": "faults", "tests/netns/": "faults"}
QUIET = tuple(UNITS)
ROOT = Path(__file__).resolve().parent.parent


class QuietLast(LoadFileScheduling):
    """`--dist loadfile`, but the quiet folders are two units."""

    def _split_scope(self, nodeid: str) -> str:
        unit = next((unit for folder, unit in UNITS.items() if nodeid.startswith(folder)), None)
        return unit or super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> QuietLast | None:
    return QuietLast(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.nodeid.startswith(QUIET))  # stable: the rest keeps its order
    if not _has_torch():
        _skip(items, "torch", "torch is not installed")
    if not _real_data().is_dir():
        _skip(items, "real_data", "no real data here")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = []
    if not _has_torch():
        left_out.append("torch not installed: tests marked torch left out (pip install torch==2.13.0 into .venv)")
    if not _real_data().is_dir():
        left_out.append("no real data (set CRUCIBLE_REAL_DATA): tests marked real_data left out")
    if why := _no_hosts():
        left_out.append(f"{why}: tests marked netns left out")
    if "not slow" in (config.getoption("markexpr") or ""):
        left_out.append("tests marked slow left out (./scripts/test -m slow)")
    for line in left_out:
        terminalreporter.write_line(f"left out: {line}")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _no_hosts() -> str:
    from tests.netns.hosts import why_not

    return why_not()


def _real_data() -> Path:
    return Path(os.environ.get("CRUCIBLE_REAL_DATA") or ROOT.parent / "shared" / "data")
