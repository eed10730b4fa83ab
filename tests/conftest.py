"""What all tests share: a Hub of their own, real data when there is some, and a home that is not the user's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hubserver.faults import FaultyHub

FOREIGN = (
    *("HF_", "HUGGING", "CRUCIBLE_", "RAY_ADDRESS", "XDG_CACHE_HOME"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_", "OMPI_"),
)

# What a shell starts in the background ignores Ctrl-C, and so would all that a test starts: tests of an interrupt would
# wait for one until their time is over.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is not a failure: by itself hypothesis fails an example that takes 0.2 s, and each test would have to
# remember to say otherwise.
settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of `tests/chaos/test_seeds.py`; pytest wants to know all options before it looks into folders."""
    chaos = parser.getgroup("chaos")
    chaos.addoption("--chaos-seed", type=int, help="play the story of this seed, and of no other")
    chaos.addoption("--chaos-rounds", type=int, help="how many stories to play, of as many seeds in a row")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the user's tokens, caches or settings, or writes among them."""
    for name in list(os.environ):
        if name.startswith(FOREIGN) and name != "CRUCIBLE_REAL_DATA":
            monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("CRUCIBLE_HOME", str(home / "crucible"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FaultyHub]:
    """An empty Hub on loopback; put repos in with `hub.import_files`, break it with `hub.add`."""
    with FaultyHub(tmp_path / "hub") as server:
        yield server


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data("gsm8k")` is the folder of a real data set; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CRUCIBLE_REAL_DATA", default))

    def find(name: str) -> Path:
        if not (folder / name).is_dir():
            pytest.skip(f"no real data {name!r} in {folder}; set CRUCIBLE_REAL_DATA to a folder of data sets")
        return folder / name

    return find
