"""Random faults from a seed, during prefetch and training; afterwards every invariant holds.

pytest tests/chaos/test_seeds.py --chaos-seed 17              one story
pytest tests/chaos/test_seeds.py --chaos-seed 17 --chaos-rounds 50   this one and the 49 after it
"""

from __future__ import annotations

import pathlib

import pytest

from tests.chaos.invariants import broken, leaks_in
from tests.chaos.play import Player
from tests.chaos.schedule import story_of
from tests.chaos.stage import Stage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SHORT = (0, 1, 2, 3, 4, 5)
LONG_FIRST, LONG_ROUNDS = 1000, 40


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames:
        return
    first, rounds = metafunc.config.getoption("--chaos-seed"), metafunc.config.getoption("--chaos-rounds")
    if first is not None:
        seeds = list(range(first, first + (rounds or 1)))
        slow = False
    elif rounds is not None:
        seeds, slow = list(range(LONG_FIRST, LONG_FIRST + rounds)), False
    else:
        seeds, slow = list(SHORT), True
    marked = [pytest.param(seed) for seed in seeds]
    if slow:
        marked += [pytest.param(seed, marks=pytest.mark.slow) for seed in range(LONG_FIRST, LONG_FIRST + LONG_ROUNDS)]
    metafunc.parametrize("seed", marked)


def test_whatever_fails_all_that_must_hold_holds(
    seed: int, chaos_stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = story_of(seed)
    played = Player(chaos_stage, story, tmp_path, monkeypatch.setenv).play()
    found = broken(played) + [f"the token lies in {path}" for path in leaks_in(chaos_stage.ray_nodes.scratch)]
    happened = "\n".join(f"  struck {strike}" for strike in played.struck)
    missed = "\n".join(f"  missed {strike}" for strike in played.missed)
    again = f"again: pytest tests/chaos/test_seeds.py --chaos-seed {seed}"
    print(
        f"{story}\n{happened}\n{missed}\nstarts: {played.runs}\nHub: {played.paid} of {played.allowed} allowed, "
        f"{played.truth.source_bytes} source"
    )
    assert not found, "\n".join([again, str(story), happened, missed, *found])
