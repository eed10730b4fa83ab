"""What becomes of this node's shards when a dataset gets a new manifest: those that it means otherwise are put aside.

That happens where a lost shard was made again by a pyarrow that writes other bytes than the one before. The rows are
the same, so nobody read anything wrong; but a shard has one digest in a cluster, and the new manifest says which.
"""

from __future__ import annotations

from contextlib import suppress

from crucible.cache.check import is_sound
from crucible.cache.store import Store
from crucible.errors import ManifestError
from crucible.manifest import Manifest


def put_aside_replaced(store: Store, manifest: Manifest) -> int:
    """Look at the shards that the manifest before this one meant otherwise; how many went. Before it gets its names."""
    columns = manifest.items[0].options.columns if manifest.items else None
    known = store.find_manifests(manifest.repo, manifest.config, columns, manifest.variant).get(manifest.split)
    if known is None or known == manifest.id:
        return 0
    before: dict[str, str] = {}
    with suppress(ManifestError):  # one that cannot be read says nothing
        before = {shard.key: shard.digest for shard in store.get_manifest(known).shards}
    changed = [shard for shard in manifest.shards if before.get(shard.key, shard.digest) != shard.digest]
    return sum(store.shard_path(shard.key).exists() and not is_sound(store, shard) for shard in changed)
