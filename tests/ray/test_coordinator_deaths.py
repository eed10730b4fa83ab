"""`kill -9` at every named failpoint, on real raylets: the job ends all the same, and nothing is done twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import crucible
import crucible.session
from crucible.failpoints import POINTS
from tests.hubserver.faults import FaultyHub
from tests.ray.conftest import Nodes
from tests.ray.jobs import Background, chat_files, file_bytes, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

FILES, ROWS = 8, 2000


class Round(NamedTuple):
    """Points at each of which one job dies once."""

    points: tuple[str, ...]
    in_flight: int
    """Items at work in the processes that die, in all: another node may have to bring their files again."""


ROUNDS = (
    Round(("journal.before", "journal.torn", "journal.after", "coordinator.claimed", "job.resolved"), 0),
    Round(("job.dispatched", "job.done", "coordinator.recovering", "worker.committed"), 2 * 3),
    Round(("job.copying", "job.sharing", "job.shared", "job.ended", "journal.compacting"), 0),
    Round(("worker.began", "worker.brought"), 0),
    Round(("worker.converted", "worker.recorded", "worker.copied", "agent.keeping", "agent.starting"), 0),
)
"""Two of a task's points are armed together: it is begun again where it was twice, and then elsewhere."""


@pytest.fixture
def cluster(start_nodes: Any, hub: FaultyHub) -> Iterator[Nodes]:
    nodes: Nodes = start_nodes(2, hub.endpoint)
    nodes.failpoints.mkdir(exist_ok=True)
    yield nodes
    for path in nodes.failpoints.iterdir():
        path.unlink()


def test_every_failpoint_has_its_round() -> None:
    assert sorted(point for points, _ in ROUNDS for point in points) == sorted(POINTS)


@pytest.mark.parametrize("one", ROUNDS, ids=lambda one: one.points[0])
def test_a_job_that_dies_at_each_of_these_points_ends_and_nothing_is_done_twice(
    one: Round, hub: FaultyHub, tmp_path: Path, cluster: Nodes
) -> None:
    commit = hub.import_folder("org/chat", chat_files(tmp_path / "data", FILES, ROWS))
    for point in one.points:
        (cluster.failpoints / point).touch()
    job = Background(cluster.address, replicas=2)
    if "job.resolved" in one.points:
        until((cluster.failpoints / "job.resolved.reached").exists)
        assert hub.import_folder("org/chat", chat_files(tmp_path / "newer", 1, 7)) != commit
    report = job.report()
    # an agent may start again after the job has ended without it
    until(lambda: all((cluster.failpoints / f"{point}.reached").exists() for point in one.points))
    assert report.commit == commit, "a job stays at the commit that it was pinned to"
    assert report.rows == FILES * ROWS
    ids = [row["id"] for row in crucible.load_dataset("org/chat", split="train", revision=commit, streaming=True)]
    assert ids == list(range(FILES * ROWS))
    extra = file_bytes(hub) - report.source_bytes
    biggest = max(path.stat().st_size for path in (tmp_path / "data").iterdir())
    assert 0 <= extra <= one.in_flight * biggest, "what had arrived did not come again"
    until(lambda: [node["alive"] for node in crucible.session.nodes(cluster.address)] == [True, True])
    (told,) = [told for told in crucible.session.status(cluster.address)["jobs"] if told["job"] == report.job]
    assert (told["phase"], told["commit"], told["items"]) == ("finished", commit, FILES)
