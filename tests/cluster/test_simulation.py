"""Small clusters in virtual time, many seeds: the product's own mind, with everything that can go wrong. And broken
minds, which must not get through.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from crucible.cluster import track
from scripts.simulation.broken import Broken
from scripts.simulation.outcome import figures, lower_bound, run
from scripts.simulation.planted import PLANTED
from scripts.simulation.scenario import NAMED, drawn, with_numbers

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "simulate.py"
SEEDS = 1_000
PART = 125


def broken_of(seeds: Iterable[int], bug: str | None = None) -> Iterator[tuple[str, Broken]]:
    """The seeds that break something, as the commands that show it again."""
    for seed in seeds:
        try:
            run(drawn(seed), bug)
        except Broken as error:
            yield f"python scripts/simulate.py --seed {seed}", error


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_whatever_happens_to_a_small_cluster_everything_holds(first: int) -> None:
    assert {again: str(error) for again, error in broken_of(range(first, first + PART))} == {}


@pytest.mark.parametrize("bug", sorted(PLANTED))
def test_a_mind_that_is_broken_on_purpose_is_caught(bug: str) -> None:
    before = track.apply
    caught = next(broken_of(range(SEEDS), bug), None)
    assert caught is not None
    assert caught[1].trace
    assert track.apply is before, "nothing of it stays"


def test_seeds_differ_and_the_same_seed_gives_the_same_run() -> None:
    def told(seed: int) -> tuple[list[str], float | None]:
        world = run(drawn(seed))
        return list(world.trace), world.ended_at

    assert told(11) == told(11)
    assert told(11) != told(12)


def test_the_drawn_clusters_have_everything_in_them() -> None:
    drawings = [drawn(seed) for seed in range(200)]
    assert any(one.deaths and one.restarts and one.joins and one.replicas > 1 and one.quota for one in drawings)
    assert any(back is not None for one in drawings for _, _, back in one.deaths)
    assert {len(one.slow) for one in drawings} >= {0, 1, 2}


def test_a_quiet_cluster_comes_close_to_the_lower_bound_and_asks_the_hub_for_each_byte_once() -> None:
    scenario = NAMED["quiet"](0)
    world = run(scenario)
    row = figures(scenario, world)
    assert row["makespan_over_bound"] < 1.2
    assert row["hub_over_repo"] == 1.0
    assert row["tries"] == scenario.items


def test_a_node_that_is_slow_holds_up_what_it_was_sent_and_no_more() -> None:
    scenario = NAMED["straggler"](0)
    world = run(scenario)
    assert world.ended_at is not None
    slow_item = scenario.item_bytes / (dict(scenario.slow)[3] * scenario.node_rate)
    assert world.ended_at < 1.2 * lower_bound(scenario, world) + 2 * slow_item
    its_queue = scenario.items / scenario.nodes * slow_item
    assert world.ended_at < its_queue / 5, "what waited for it went to others"


def test_after_a_refusal_the_whole_cluster_is_quiet_and_the_job_ends() -> None:
    scenario = NAMED["limited"](0)
    world = run(scenario)
    assert world.error is None
    assert world.cluster.hub.requests <= scenario.items + world.cluster.hub.refusals
    assert world.cluster.hub.refusals < 0.2 * scenario.items


def test_losing_half_the_nodes_costs_the_hub_no_more_than_their_share() -> None:
    scenario = with_numbers(NAMED["losses"](1), items=400)
    world = run(scenario)
    assert world.error is None
    assert world.cluster.hub_bytes <= 2 * sum(world.items.sizes)


def test_the_command_prints_figures_and_for_what_breaks_how_to_see_it_again() -> None:
    def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    fine = simulate("--seeds", "3", "--json")
    assert fine.returncode == 0, fine.stderr
    assert [json.loads(line)["seed"] for line in fine.stdout.splitlines()] == [0, 1, 2]
    bad = simulate("--seeds", "12", "--planted", "forgets")
    assert bad.returncode == 1
    line = next(line for line in bad.stderr.splitlines() if line.startswith("again: "))
    told = simulate(*line.removeprefix("again: python scripts/simulate.py ").split())
    assert told.returncode == 1
    assert told.stderr in bad.stderr


@pytest.mark.slow
def test_ten_thousand_seeds() -> None:
    assert {again: str(error) for again, error in broken_of(range(SEEDS, 10 * SEEDS))} == {}
