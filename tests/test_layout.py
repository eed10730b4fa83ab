"""The shape of the checkout: links, guards, what the wheel holds, and how long a module may be. See CONTRIBUTING.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"workers": "crucible.workers", "cluster": "crucible.cluster"}
MAX_LINES = 400

# Modules over the limit, each with the reason why it is one thing and not two. An entry whose module fits again fails.
LONG_ON_PURPOSE: dict[str, str] = {}


def modules() -> list[Path]:
    """Every module, once, at its real path (`crucible/workers` and `crucible/cluster` are links)."""
    return [
        path
        for room in ("crucible", "workers", "cluster", "scripts", "tests")
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.resolve() == path
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_linked_into_the_package(room: str) -> None:
    link = ROOT / "crucible" / room
    assert link.is_symlink(), f"{link} is not a link: this checkout lost it; run `ln -s ../{room} crucible/{room}`"
    assert link.readlink() == Path("..") / room


@pytest.mark.parametrize("room", ROOMS)
def test_the_link_is_committed_as_a_link(room: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--stage", f"crucible/{room}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert listed.startswith("120000 "), f"git has no symlink at crucible/{room}: {listed!r}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_refuses_to_be_imported_by_its_folder_name(room: str) -> None:
    child = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode != 0
    assert f"ImportError: import this package as {ROOMS[room]}" in child.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_flat(room: str) -> None:
    folders = [path.name for path in (ROOT / room).iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders == [], "a room has one purpose a file and no folders"


def test_the_wheel_holds_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        init.parent.relative_to(ROOT).as_posix().replace("/", ".") for init in modules() if init.name == "__init__.py"
    }
    found = {ROOMS.get(name, name) for name in found if name.split(".")[0] not in ("tests", "scripts")}
    assert set(setuptools["packages"]) == found
    assert setuptools["package-dir"] == {name: room for room, name in ROOMS.items()}


def test_a_module_fits_on_a_few_screens() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules()}
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES and name not in LONG_ON_PURPOSE}
    assert not too_long, f"over {MAX_LINES} lines: split by purpose, or give the reason in LONG_ON_PURPOSE"
    fit_again = [name for name in LONG_ON_PURPOSE if lengths.get(name, 0) <= MAX_LINES]
    assert not fit_again, "these need no exception any more: take them out of LONG_ON_PURPOSE"


@pytest.mark.parametrize(
    "script", ["scripts/test", "scripts/check", "scripts/demo", "scripts/lock", "scripts/simulate", ".ci/run"]
)
def test_a_script_can_be_run_as_it_was_cloned(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK), f"{script}: not executable; `git update-index --chmod=+x {script}`"
    assert subprocess.run(["bash", "-n", ROOT / script], capture_output=True, check=False).stderr == b""


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {line.split("==")[0].strip().lower(): line for line in lines}


def test_constraints_hold_versions_and_nothing_else() -> None:
    wrong = [line for line in pins().values() if not re.match(r"^[A-Za-z0-9._-]+==[^ /@]+( ; .+)?$", line)]
    assert wrong == [], "no addresses, no ranges, no flags: it has to serve behind any mirror"
    cuda = [name for name in pins() if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert cuda == [], "these come with a GPU build of torch, which names its own versions"


def test_every_direct_dependency_is_constrained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in asked}
    assert names - set(pins()) == set(), "pyproject.toml asks for these; run ./scripts/lock and commit constraints.txt"
