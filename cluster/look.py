"""What is where: this node's store, the nodes of a running cluster and their jobs, and who holds which shard.

Runs in the process of whoever asks. Changes nothing but the secret, and starts no Ray of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crucible.cache.store import Store
from crucible.cluster.connect import cluster, import_ray
from crucible.cluster.drive import LOCAL
from crucible.cluster.prepare import prepare
from crucible.config import Settings, settings_with
from crucible.data_files import DataFiles, data_request
from crucible.errors import ManifestError
from crucible.reach import listens
from crucible.report import Tally


@dataclass(frozen=True, slots=True)
class Located:
    """Where a split's shards are."""

    split: str
    shard: int
    key: str
    rows: int
    size: int
    urls: tuple[str, ...]


def nodes(address: str | None = None) -> list[dict[str, Any]]:
    """One entry a node of a running cluster: its store's shards, bytes and free bytes. Raises ClusterUnreachable."""
    from crucible.cluster.coordinator import reach_coordinator

    with cluster(_running(address)):
        found: list[dict[str, Any]] = import_ray().get(reach_coordinator(embedded=False).nodes.remote())
        return found


def rotate_secret(address: str | None = None, *, overlap_s: float) -> dict[str, Any]:
    """Change the secret of a running cluster: `number`, `overlap_s`, and `missed`, node -> why. See `keys`."""
    from crucible.cluster.coordinator import reach_coordinator

    with cluster(_running(address)):
        told: dict[str, Any] = import_ray().get(reach_coordinator(embedded=False).rotate_secret.remote(overlap_s))
        return told


def status(address: str | None = None) -> dict[str, Any]:
    """This node's store and agent; and the jobs of a running cluster, by `address` or RAY_ADDRESS."""
    from crucible.workers.serve import read_address, store_status

    settings = Settings.from_env()
    store = Store(settings.home)
    agent = read_address(store)
    here: dict[str, Any] = store_status(store, LOCAL, agent.url if agent and listens(agent.url) else "")
    here["manifests"] = [
        {
            "repo": m.repo.repo_id,
            "commit": m.repo.revision,
            "config": m.config,
            "split": m.split,
            "rows": m.rows,
            "shards": len(m.shards),
            "shards_here": sum(store.has_shard(shard) for shard in m.shards),
            "bytes": m.size,
            "manifest": m.id,
            "partial": m.partial,
        }
        for m in store.manifests()
    ]
    if (where := address or settings.ray_address) is not None:
        from crucible.workers.tasks import coordinator

        with cluster(where):
            here["jobs"] = import_ray().get(coordinator().jobs.remote())
    return here


def locate(
    repo: str,
    config: str | None = None,
    *,
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    partial: bool = False,
    data_dir: str | None = None,
    data_files: DataFiles | None = None,
    features: Mapping[str, Any] | None = None,
    address: str | None = None,
    endpoint: str | None = None,
    **format_settings: Any,
) -> list[Located]:
    """Which node holds which shard of a dataset that was prefetched with the same arguments."""
    from crucible.workers.tasks import coordinator

    settings = settings_with(Settings.from_env(), endpoint=endpoint)
    request = data_request(
        repo,
        config,
        split=split,
        revision=revision,
        columns=columns,
        data_dir=data_dir,
        data_files=data_files,
        features=features,
        settings=format_settings,
        partial=partial,
    )
    prepared = prepare(request, settings, Store(settings.home), Tally())
    if not prepared.cached:
        raise ManifestError(repo, f"is not in {settings.home}; run `crucible prefetch {repo}` first")
    with cluster(_running(address or settings.ray_address)):
        keys = [shard.key for manifest in prepared.manifests for shard in manifest.shards]
        holders: dict[str, list[str]] = import_ray().get(coordinator().locate.remote(keys))
    return [
        Located(manifest.split, number, shard.key, shard.rows, shard.size, tuple(holders[shard.key]))
        for manifest in prepared.manifests
        for number, shard in enumerate(manifest.shards)
    ]


def _running(address: str | None) -> str:
    """The address of a cluster that must be there already."""
    return address or Settings.from_env().ray_address or "auto"
