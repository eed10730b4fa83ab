"""What readers of a job may know before it ends, and what they wish for. No Ray; the coordinator has one for each job.

An answer to a reader is a dict of JSON, because it goes on over HTTP. Its `state` says how the job stands:

    none      no job has this request: whoever needs it makes it
    soon      ask again
    early     `manifests`: with the rows of all shards, made or not
    whole     the rows are known only at the job's end: wait for it
    done      `manifests`: complete
    failed    `error`
    unknown   there is no such job here: it was another coordinator's
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from crucible.cluster.drive import job_items
from crucible.cluster.prepare import Prepared
from crucible.errors import CrucibleError
from crucible.manifest import Manifest
from crucible.refs import DataRequest, ShardInfo
from crucible.report import ItemResult
from crucible.splits import split_names

log = logging.getLogger("crucible.readers")

Answer = dict[str, Any]
ENDED = ("failed", "forgotten")
MOST_KEYS = 256
"""Of one wish. What a reader needs later it may say later."""


class Readers:
    """The readers of one job.

    Concurrency: any method from any thread.
    """

    def __init__(self, job: str, request: DataRequest) -> None:
        self.job, self._request = job, request
        self._lock = threading.Lock()
        self._prepared: Prepared | None = None
        self._splits: tuple[str, ...] = ()
        self._early: Callable[[], tuple[Manifest, ...] | None] | None = None
        self._state = "soon"
        self._manifests: tuple[Manifest, ...] = ()
        self._error = ""
        self._asked = False
        self._places: dict[str, list[int]] | None = None
        """item key -> indexes of the job's items: the same content may be in a repo twice. Made at the first wish."""
        self._made: dict[str, tuple[ShardInfo, ...]] = {}
        """item key -> its shards so far."""
        self._wished: list[tuple[int, ...]] = []

    # --- what the job tells

    def begin(self, prepared: Prepared, early: Callable[[], tuple[Manifest, ...] | None]) -> None:
        """The job knows what it will do. `early` makes its early manifests, or None; called when a reader asks."""
        with self._lock:
            self._prepared, self._early = prepared, early
            self._splits = tuple(s.split for s in prepared.manifests) or tuple(s.name for s in prepared.splits)
            self._places = None

    def made(self, key: str, shard: ShardInfo) -> None:
        """A shard of the item `key` is in some node's store."""
        with self._lock:
            if self._state not in ENDED and all(shard.key != known.key for known in self._made.get(key, ())):
                self._made[key] = (*self._made.get(key, ()), shard)

    def done(self, result: ItemResult) -> None:
        """An item is done."""
        with self._lock:
            if self._state not in ENDED:
                self._made[result.key] = result.shards

    def wishes(self) -> Sequence[tuple[int, ...]]:
        """What was wished for since this was asked last."""
        with self._lock:
            wished, self._wished = self._wished, []
        return wished

    def finish(self, manifests: tuple[Manifest, ...]) -> None:
        with self._lock:
            self._state, self._manifests = "done", manifests

    def fail(self, error: CrucibleError) -> None:
        with self._lock:
            self._state, self._error = "failed", f"{type(error).__name__}: {error}"

    def forget(self) -> None:
        """The job ended long ago: a reader who comes now is told that there is none."""
        with self._lock:
            self._state, self._manifests, self._wished = "forgotten", (), []
            self._made, self._places, self._prepared, self._early = {}, None, None, None

    # --- what readers ask

    def opening(self, request: DataRequest) -> Answer | None:
        """What a reader of `request` may begin with; None if this job is about something else, or has failed."""
        with self._lock:
            prepared, state = self._prepared, self._state
            if state in ENDED or request.repo.repo_id != self._request.repo.repo_id:
                return None
            if prepared is not None and not self._is_about(prepared, request):
                return None
            if prepared is None or state == "soon":
                if prepared is not None and not self._asked:
                    self._asked = True
                    threading.Thread(target=self._prepare, name="crucible-early", daemon=True).start()
                return {"state": "soon", "job": self.job}
            answer: Answer = {"state": state, "job": self.job}
            if state in ("early", "done"):
                wanted = self._wanted(request)
                answer["manifests"] = [m.to_json().decode() for m in self._manifests if m.split in wanted]
                answer["survey"], answer["revisions"] = dict(prepared.survey), list(prepared.revisions)
            return answer

    def wish(self, keys: Sequence[str]) -> Answer:
        """Items that a reader needs, in its order; and their shards that are made."""
        with self._lock:
            if self._state == "failed":
                return {"state": "failed", "error": self._error}
            if self._state == "forgotten":
                return {"state": "unknown"}
            if self._state != "done":
                places = self._items()
                self._wished.append(tuple(index for key in keys[:MOST_KEYS] for index in places.get(key, ())))
            found = [shard for key in keys[:MOST_KEYS] for shard in self._made.get(key, ())]
            return {"state": self._state, "shards": [asdict(shard) for shard in found]}

    # --- inside

    def _items(self) -> dict[str, list[int]]:
        if self._places is None:
            self._places = {}
            for item in job_items(self._prepared) if self._prepared is not None else ():
                self._places.setdefault(item.key, []).append(item.index)
        return self._places

    def _prepare(self) -> None:
        made = None
        try:
            made = self._early() if self._early is not None else None
        except Exception as error:  # noqa: BLE001 - readers then wait for the job, which says itself what is wrong
            log.warning("job %s: no reader can begin early (%s)", self.job, error)
        with self._lock:
            if self._state == "soon":
                self._state, self._manifests = ("whole", ()) if made is None else ("early", made)

    def _is_about(self, prepared: Prepared, request: DataRequest) -> bool:
        mine = prepared.request
        asked_of = replace(request, repo=mine.repo, config=mine.config, split=mine.split)
        same_repo = request.repo in (mine.repo, prepared.repo)
        config = request.config or prepared.survey.get("default")
        same_config = config == prepared.config or (request.config is None and mine.config is None)
        return asked_of == mine and same_repo and same_config and set(self._wanted(request)) <= set(self._splits)

    def _wanted(self, request: DataRequest) -> tuple[str, ...]:
        """The splits a request needs whole."""
        if request.split is not None and request.split != "all":
            return split_names(request.split, self._splits)
        assert self._prepared is not None
        known = self._prepared.survey.get("configs", {}).get(self._prepared.config)
        return tuple(known) if known else self._splits
