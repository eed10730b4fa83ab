"""A quota in a cluster: a node that is full gives its work to others, and nobody gives up what cannot be had again."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import crucible
from crucible.cache.store import Store
from crucible.cache.usage import Usage
from crucible.config import Settings
from crucible.hashing import shard_digest
from crucible.manifest import Manifest
from crucible.workers.room import make_room
from tests.hubserver.faults import FaultyHub
from tests.ray.conftest import Nodes
from tests.ray.jobs import chat_files, until

FILES, ROWS = 6, 3000
WAIT_S = 60


def holders(nodes: Nodes, manifest: Manifest) -> Counter[str]:
    """How many stores have each shard, with the right bytes."""
    found: Counter[str] = Counter()
    for home in nodes.homes:
        store = Store(home)
        for shard in manifest.shards:
            if store.has_shard(shard):
                assert shard_digest(store.shard_path(shard.key)) == shard.digest
                found[shard.key] += 1
    return found


def test_a_full_node_passes_its_work_on_and_evicts_only_what_can_be_had_again(
    hub: FaultyHub, start_nodes: Any, tmp_path: Path
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "repo", FILES, ROWS))
    quota = 1 << 20
    nodes = start_nodes(3, hub.endpoint, CRUCIBLE_QUOTA=str(quota), CRUCIBLE_TRIES="1")
    for environment in (os.environ, nodes.environment):
        del environment["CRUCIBLE_QUOTA"]  # the third node's own: it was started with it
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    manifest = next(Store(nodes.homes[0]).manifests())
    held = holders(nodes, manifest)
    assert set(held) == {shard.key for shard in manifest.shards}
    assert Usage(nodes.homes[2]).bytes() <= quota

    node = max(nodes.homes[:2], key=lambda home: Usage(home).shards())
    settings = Settings(node)
    own = [shard.key for shard in manifest.shards if Store(node).has_shard(shard)]
    single = [key for key in own if holders(nodes, manifest)[key] == 1]
    hub.add("status", origin="hub", status=503)
    total = sum(shard.size for shard in manifest.shards if shard.key in own)
    assert not make_room(Store(node), settings, total, None) or not single, "its source does not answer"
    assert all(holders(nodes, manifest)[shard.key] for shard in manifest.shards), "the last copy of each is there"
    hub.clear_faults()
    before = Usage(node).shards()[1]
    # a source that was away is asked again soon
    until(lambda: make_room(Store(node), settings, 1000, None), most_s=WAIT_S)
    assert Usage(node).shards()[1] < before
    rows = [row for rank in nodes.ranks("org/chat", split="train", epochs=1) for row in rank["epochs"][0]]
    assert len(rows) == len(set(rows)) == FILES * ROWS, "each row once, whatever went"
