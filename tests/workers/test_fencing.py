"""A node does what the newest coordinator of its cluster says, and nothing that an older one says after that."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cache.store import Store
from crucible.errors import StaleCoordinator
from crucible.workers.fencing import CLUSTERS_KEPT, FOLDER, Epoch, Fence

calls = st.lists(
    st.tuples(st.sampled_from(["one", "two"]), st.integers(1, 4), st.sampled_from("ab"), st.booleans()), max_size=12
)


@settings(max_examples=40)
@given(calls)
def test_whoever_comes_after_a_later_epoch_is_refused_also_by_processes_that_have_not_heard_it_themselves(
    said: list[tuple[str, int, str, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        fence = Fence(store, "node 1")
        newest: dict[str, tuple[int, str]] = {}
        for cluster, number, who, another_process in said:
            if another_process:
                fence = Fence(store, "node 1")
            known = newest.get(cluster, (0, ""))
            if number > known[0] or (number, who) == known:
                fence.check(Epoch(cluster, number, who))
                newest[cluster] = (number, who)
            else:
                with pytest.raises(StaleCoordinator) as refused:
                    fence.check(Epoch(cluster, number, who))
                assert (refused.value.epoch, refused.value.newest) == (number, known[0])


def test_of_two_that_race_in_many_processes_one_wins_everywhere(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom crucible.cache.store import Store\n"
        "from crucible.errors import StaleCoordinator\nfrom crucible.workers.fencing import Epoch, Fence\n"
        "fence = Fence(Store(Path(sys.argv[1])), 'node')\n"
        "for number in range(1, 200):\n"
        "    try:\n        fence.check(Epoch('c', number, sys.argv[2]))\n        print(number)\n"
        "    except StaleCoordinator:\n        pass\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen([*command, who], stdout=subprocess.PIPE, text=True) for who in "ab"]
    passed = [set(process.communicate(timeout=60)[0].split()) for process in both]
    assert passed[0] & passed[1] == set(), "no number was let through for both"
    assert "199" in passed[0] | passed[1]


def test_a_store_remembers_few_clusters_and_a_damaged_note_is_no_word(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(2 * CLUSTERS_KEPT):
        Fence(store, "node").check(Epoch(f"cluster {number}", 9, "a"))
    assert len(list((tmp_path / FOLDER).iterdir())) == CLUSTERS_KEPT
    epoch = Epoch("here", 1, "a")
    for text in ("", "{", "[]", json.dumps({"cluster": "here"}), json.dumps({"cluster": "there", "number": 7})):
        store.write_small(epoch.file, text.encode())
        Fence(store, "node").check(epoch)


def test_a_store_that_was_emptied_hears_of_the_epoch_again_with_the_next_word(tmp_path: Path) -> None:
    store = Store(tmp_path)
    agent, epoch = Fence(store, "node"), Epoch("here", 5, "a")
    agent.check(epoch)
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.raises(StaleCoordinator):
        agent.check(Epoch("here", 4, "b"))
    agent.check(epoch)
    with pytest.raises(StaleCoordinator):
        Fence(store, "a task").check(Epoch("here", 4, "b"))


def test_a_full_disk_keeps_no_agent_from_listening_to_the_newest(tmp_path: Path) -> None:
    agent = Fence(Store(tmp_path), "node")
    agent.check(Epoch("here", 1, "a"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        for _ in range(2):
            agent.check(Epoch("here", 2, "b"))  # who makes room is obeyed
        with pytest.raises(StaleCoordinator):
            agent.check(Epoch("here", 1, "a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
