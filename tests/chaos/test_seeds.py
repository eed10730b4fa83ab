"""Random faults from a seed, during prefetch and training; afterwards every invariant holds.

pytest tests/chaos/test_seeds.py --chaos-seed 17              one story
pytest tests/chaos/test_seeds.py --chaos-seed 17 --chaos-rounds 50   this one and the 49 after it
"""

from __future__ import annotations

import pathlib
from dataclasses import replace

import pytest

from tests.chaos.invariants import CHECKS, broken, leaks_in
from tests.chaos.planted import PLANTED
from tests.chaos.play import Player
from tests.chaos.schedule import DURING_PREFETCH, DURING_TRAINING, FORMS, HARD, HUB_FAULTS, story_of
from tests.chaos.stage import Stage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# every kind of fault is in one of them
SHORT = (377, 300, 258, 321, 309, 399, 217)
LONG_FIRST, LONG_ROUNDS = HARD - 20, 40


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
    told = "\n".join(
        [
            f"again: pytest tests/chaos/test_seeds.py --chaos-seed {seed}",
            *(str(story), *played.notes, *map(str, played.runs)),
            f"the Hub sent {played.paid} bytes for {played.truth.source_bytes}, {played.allowed} were allowed",
        ]
    )
    print(told)  # pytest shows it when the test fails
    assert not found, "\n".join([told, *found])


def test_the_short_form_has_every_kind_of_fault_and_a_seed_says_all() -> None:
    stories = [story_of(seed) for seed in SHORT]
    strikes = [strike for story in stories for strike in (*story.prefetch, *story.training)]
    possible = [kind for kind, weight in (*DURING_PREFETCH, *DURING_TRAINING) if weight]
    assert {strike.kind for strike in strikes} == set(possible)
    assert {strike.what for strike in strikes if strike.kind == "hub"} == set(HUB_FAULTS)
    assert {story.form for story in stories} == set(FORMS)
    assert {story.early for story in stories} == {True, False}
    assert [story_of(seed) for seed in SHORT] == stories


CALM = replace(story_of(0).calm(), seed=10**6, files=3, rows=300, replicas=2, epochs=1, worlds=(2,), early=False)


def test_the_invariants_see_whatever_is_planted(
    chaos_stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Player(chaos_stage, CALM, tmp_path, monkeypatch.setenv).play()
    assert broken(played) == []
    for name, plant in PLANTED:
        with plant(played):
            assert list(CHECKS[name](played)), f"{plant.__name__} passes unnoticed"
        assert list(CHECKS[name](played)) == [], f"{plant.__name__} stays"
    assert {name for name, _ in PLANTED} == set(CHECKS), "an invariant that has never failed shows nothing"


@pytest.mark.parametrize(
    ("planted", "named"),
    [("dropped", "every sample comes exactly once: epoch 0"), ("altered", "no altered row reaches a batch: 1 batches")],
)
def test_a_rank_that_loses_or_spoils_a_batch_is_found_out(
    planted: str, named: str, chaos_stage: Stage, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAOS_PLANTED", planted)
    story = replace(CALM, worlds=(1,), files=2, replicas=1)
    found = broken(Player(chaos_stage, story, tmp_path, monkeypatch.setenv).play())
    assert len(found) == 1
    assert found[0].startswith(named)
