"""The agent: one Ray actor a node, pinned to it. Owns the store's port, and reports what the store holds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import ray as untyped_ray

from crucible.cache.store import Store
from crucible.config import node_settings
from crucible.errors import CrucibleError, StoreVersion
from crucible.manifest import manifest_from_json
from crucible.refs import RepoRef
from crucible.versions import versions_here
from crucible.workers.asking import request_from_json
from crucible.workers.secret import keep_secret
from crucible.workers.serve import AgentAddress, AgentServer, store_status, write_address
from crucible.workers.tasks import ASK_TIMEOUT_S, coordinator, this_node

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

LOCATE_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0


class AgentCore:
    """Serves this node's store. Everything it knows is on disk or with the coordinator, so it restarts without loss.

    `host` is the address it listens on: the node's own, which is the loopback address in an embedded cluster.
    """

    def __init__(self, host: str) -> None:
        self._node, self._host, self._problem = this_node(), host, ""
        self._begin(host)

    def _begin(self, host: str) -> None:
        """Open the store and serve it. One of a layout that this crucible does not know is left alone: see `hello`."""
        try:
            self._store = Store(node_settings().home)
        except StoreVersion as error:
            self._problem = str(error)
            return
        self._problem = ""
        # asked for, not passed in: an actor's arguments are kept and shown by more parts of Ray than its replies
        secret = ray.get(coordinator().secret.remote(), timeout=ASK_TIMEOUT_S)
        keep_secret(self._store, secret)
        self._server = AgentServer(self._store, secret, self._node, host, 0, self._locate, self._ask)
        self.set_peers([])

    def hello(self) -> dict[str, Any]:
        """Who answers: versions, the time in seconds since 1970, url, and why the store cannot be served, if so.

        Plain values, because whoever asks may be of another version.
        """
        if self._problem:
            self._begin(self._host)
        url = "" if self._problem else self._server.url
        return {**versions_here().told(), "url": url, "store_problem": self._problem, "clock": time.time()}

    def sample(self) -> str:
        """What this node makes of the sample: see `workers.sample`."""
        from crucible.workers.sample import sample_digest  # pyarrow: 0.25 s and 90 MB that only a mixed cluster pays

        with self._store.workspace() as folder:
            return sample_digest(folder)

    def address(self) -> str:
        return self._server.url

    def set_peers(self, urls: Sequence[str]) -> None:
        """Note the other agents in `agent.json`, for readers whose agent has died with its cluster."""
        peers = tuple(url for url in urls if url != self._server.url)
        write_address(self._store, AgentAddress(self._server.url, self._node, os.getpid(), peers))

    def report(self) -> tuple[dict[str, int], list[str]]:
        """(bytes of each shard by its key, item keys) that the store holds, for the catalog."""
        return dict(self._store.shards()), list(self._store.item_keys())

    def status(self) -> dict[str, object]:
        return store_status(self._store, self._node, self._server.url)

    def weight(self) -> float:
        """Free bytes: what placement weighs this node by."""
        return float(self._store.free_bytes())

    def keep(self, manifests: Sequence[bytes], revisions: Sequence[str], survey: dict[str, Any]) -> None:
        """Keep a finished job's manifests, so that this node's ranks need to ask nobody what the dataset is."""
        repo: RepoRef | None = None
        for data in manifests:
            manifest = manifest_from_json(data)
            self._store.put_manifest(manifest, tuple(revisions))
            repo = manifest.repo
        if repo is not None:
            for revision in {repo.revision, *revisions}:
                self._store.put_survey(RepoRef(repo.repo_id, revision, repo.repo_type), survey)

    def _locate(self, key: str) -> list[str]:
        try:
            found = ray.get(coordinator().locate.remote([key]), timeout=LOCATE_TIMEOUT_S)
            return list(found.get(key, []))
        except (ray.exceptions.RayError, CrucibleError):
            return []  # the reader still has the peers in agent.json

    def _ask(self, what: str, question: Any) -> Any:
        """The coordinator's answer to a reader's question; None when no coordinator gives one. Raises TypeError."""
        if what == "opening":
            request, endpoint = request_from_json(question["request"]), str(question["endpoint"])
        else:
            job, keys = str(question["job"]), [str(key) for key in question["keys"]]
        try:
            there = coordinator()
            call = there.opening.remote(request, endpoint) if what == "opening" else there.wish.remote(job, keys)
            return ray.get(call, timeout=ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, CrucibleError):
            return None


Agent: Any = ray.remote(num_cpus=0, max_concurrency=4, max_restarts=-1)(AgentCore)
