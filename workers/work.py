"""Do one work item: bring its files, convert them, commit the shards. The same function in a Ray task and without Ray.

What is finished is in the store and is found again, so an item that is run twice (a retry, another process, the next
job) moves nothing the second time. A killed task leaves a folder in the store's `tmp`, which the next task removes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.hub.client import is_folder
from crucible.hub.http import HubHttp
from crucible.manifest import pack_schema
from crucible.refs import NodeId, RepoRef, ShardInfo, SourceFile, WorkItem, safe_repo_path
from crucible.report import ItemResult, Tally
from crucible.workers.convert import convert, schema_of_item
from crucible.workers.download import DownloadOptions, download
from crucible.workers.sources import FolderSource, HubSource, PeerSource, Source

FILES_AT_ONCE = 4
"""Small files of one item in flight together: enough to hide one round trip behind the others."""


@dataclass(frozen=True)
class Workplace:
    """What a worker function needs to know about where it runs."""

    store: Store
    settings: Settings
    node: NodeId
    progress: Callable[[int], None] = lambda _: None
    """Called with source bytes as they arrive; negative when bytes are taken back."""


def run_item(item: WorkItem, place: Workplace) -> ItemResult:
    """Make sure that all shards of `item` are in the store, and say which they are.

    Raises a TransferError, RepoError, ConversionError or StoreError; the store is then as it was before.
    """
    began = time.monotonic()
    if (found := place.store.get_item(item, place.node)) is not None:
        place.progress(item.size)
        return found
    # one process of this node works on an item, the others wait here and then find it done
    with place.store.lock(f"item-{item.key[:32]}"):
        if (found := place.store.get_item(item, place.node)) is not None:
            place.progress(item.size)
            return found
        tally = Tally()
        with place.store.workspace() as folder:
            paths = _bring(item, place, folder, tally)
            shards: list[ShardInfo] = []
            schemas: dict[str, str] = {}
            for draft in convert(item, paths, folder):
                digest, packed = pack_schema(draft.schema)
                schemas[digest] = packed
                key = item.shard_key(draft.number)
                place.store.commit_shard(draft.path, key)
                shards.append(ShardInfo(key, draft.rows, draft.size, draft.digest, digest, item.index, draft.number))
            if not shards and (schema := schema_of_item(item, paths)) is not None:
                schemas = dict([pack_schema(schema)])
        seconds = time.monotonic() - began
        result = ItemResult(
            item.index, item.key, place.node, tuple(shards), tuple(schemas.items()), tally.counts, seconds
        )
        place.store.put_item(result)
        return result


def copy_shard(shard: ShardInfo, urls: Sequence[str], secret: str, place: Workplace, tally: Tally) -> Path:
    """Bring a shard from the first peer that has it right, verified against its digest. Raises a TransferError."""
    if place.store.has_shard(shard):
        return place.store.shard_path(shard.key)
    with place.store.lock(f"shard-{shard.key[:32]}"):
        if place.store.has_shard(shard):
            return place.store.shard_path(shard.key)
        file = SourceFile(shard.key, shard.size, shard.digest, lfs=True)
        peers = [PeerSource(url, secret, tally, timeout_s=place.settings.timeout_s) for url in urls]
        # a peer that fails is not asked again: another one, or the Hub, is nearer than its backoff
        options = DownloadOptions(place.settings.part_bytes, tries=1, backoff_cap_s=0)
        with place.store.workspace() as folder:
            draft = download(file, peers, folder / "shard", options, tally)
            return place.store.commit_shard(draft, shard.key)


def _bring(item: WorkItem, place: Workplace, folder: Path, tally: Tally) -> list[Path]:
    settings = place.settings
    options = DownloadOptions(settings.part_bytes, settings.tries, settings.backoff_cap_s)
    with _source(item.repo, settings, tally) as source:

        def bring(number: int, file: SourceFile) -> Path:
            safe_repo_path(item.repo.repo_id, file.path)
            # a number for a name: whatever the repo calls the file, it cannot collide or leave the folder
            return download(file, [source.source], folder / f"source-{number}", options, tally, place.progress)

        if len(item.files) == 1:
            return [bring(0, item.files[0])]
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="crucible-download") as pool:
            futures = [pool.submit(bring, number, file) for number, file in enumerate(item.files)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class _source:
    """The repo's source for the time of a `with`: closes its connections at the end."""

    def __init__(self, repo: RepoRef, settings: Settings, tally: Tally) -> None:
        self._http: HubHttp | None = None
        if is_folder(repo.repo_id):
            self.source: Source = FolderSource(Path(repo.repo_id), tally)
        else:
            self._http = HubHttp(settings, tally)
            self.source = HubSource(self._http, repo)

    def __enter__(self) -> _source:
        return self

    def __exit__(self, *_: object) -> None:
        if self._http is not None:
            self._http.close()
