"""The agent: one Ray actor a node, pinned to it. Owns the store's port, and reports what the store holds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray as untyped_ray

from crucible.cache.replaced import put_aside_replaced
from crucible.cache.store import Store
from crucible.cache.usage import room_of
from crucible.config import Settings, node_settings
from crucible.errors import ClusterError, CrucibleError, StoreError, UsageError
from crucible.failpoints import reach
from crucible.manifest import manifest_from_json
from crucible.refs import NodeId, RepoRef
from crucible.versions import versions_here
from crucible.workers.asking import request_from_json
from crucible.workers.caring import Caring
from crucible.workers.evict import Alone, Neighbours
from crucible.workers.fencing import FOLDER, Epoch, Fence
from crucible.workers.keeping import Keeping
from crucible.workers.leaving import drain_on_sigterm
from crucible.workers.secret import News, Secret, keep_old, keep_secret, load_old, load_secret
from crucible.workers.serve import AgentAddress, AgentServer, read_address, store_status, write_address
from crucible.workers.tasks import ASK_TIMEOUT_S, coordinator, this_node
from crucible.workers.tls import prepare_node

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

LOCATE_TIMEOUT_S = 2.0
SILENT_S = 15.0
"""A coordinator that did not say in time who has a shard is not asked again for so long, unless it is heard of: else
every shard that a reader wants would wait for a head that died."""
ANSWER_TIMEOUT_S = 10.0
DROP_TIMEOUT_S = 30.0
"""For a coordinator that may have to ask the Hub whether it still has something."""
RETRY_S = 0.2
FIGURES = ("here", "summary", "nodes", "jobs", "locate")
"""What may be asked over HTTP: nothing that changes anything."""
TOLD = f"{FOLDER}/told"
"""What the coordinator must not forget, should it come up on this node; see `cluster.journal`."""


class AgentCore(Caring, Keeping):
    """Serves this node's store. Everything it knows is on disk or with the coordinator, so it restarts without loss.

    `host` is the address it listens on: the node's own, which is the loopback address in an embedded cluster.
    """

    def __init__(self, host: str) -> None:
        self._node, self._host, self._problem = this_node(), host, ""
        self._secret = Secret("", 0)
        self._silent_until = 0.0
        self._begin(host)
        if not self._problem:
            self._begin_scrubbing()
            drain_on_sigterm(self._node, node_settings().grace_s, self._has_peers)

    def _begin(self, host: str) -> None:
        """Open the store and serve it. Where its layout, secret or certificates forbid it, `hello` says so.

        Raises AgentUnavailable when it cannot listen.
        """
        try:
            self._open(node_settings(), host)
        except (StoreError, UsageError) as error:
            self._problem = str(error)
        else:
            self._problem = ""

    def _open(self, settings: Settings, host: str) -> None:
        self._store = Store(settings.home)
        self._fence = Fence(self._store, f"node {self._node[:12]}")
        self._told: tuple[int, int] = (0, 0)
        self._hearing = threading.Lock()
        load_secret(self._store)  # one that others may have read is refused, not written over
        # asked for, not passed in: an actor's arguments are kept and shown by more parts of Ray than its replies
        news = _asked(lambda there: there.secret.remote())
        tls = prepare_node(settings, _asked(lambda there: there.authority.remote()), host)
        keep_secret(self._store, news.now.text, news.now.number)
        self._secret = news.now
        reach("agent.starting")
        ports = settings.agent_ports
        self._server = AgentServer(
            self._store, news.now.text, self._node, host, ports, self._locate, self._ask, tls=tls
        )
        if (old := load_old(self._store)) is not None:
            self._server.keyring.accept(*old)
        self._hear_of(news)
        self.set_peers([])
        # one that Ray started again listens on another port; a coordinator that is not there now will ask
        with suppress(CrucibleError):
            coordinator().registered.remote(self._node, self._server.url)

    def _has_peers(self) -> bool:
        found = read_address(self._store)
        return found is not None and bool(found.peers)

    def obey(self, epoch: Epoch, method: str, *arguments: Any, **named: Any) -> Any:
        """Do what the coordinator of `epoch` says: one of the methods below. Raises StaleCoordinator."""
        if self._problem:
            raise ClusterError(f"node {self._node[:12]}: {self._problem}")
        self._fence.check(epoch)
        self._silent_until = 0.0
        if method.startswith("_"):
            raise ClusterError(f"an agent has no method {method!r} for others")
        return getattr(self, method)(*arguments, **named)

    def hear(self, epoch: int, number: int, lines: bytes) -> None:
        """Keep what a coordinator must remember. Of two tellings the later one counts, in whatever order they come."""
        with self._hearing:
            if (epoch, number) > self._told:
                self._store.write_small(TOLD, lines)
                self._told = (epoch, number)

    def told(self) -> bytes:
        """What a coordinator has told this node, maybe long ago; empty if none has."""
        return self._store.read_small(TOLD) or b""

    def hello(self) -> dict[str, Any]:
        """Who answers: versions, the time in seconds since 1970, url, and why the store cannot be served, if so.

        Plain values, because whoever asks may be of another version.
        """
        if self._problem:
            self._begin(self._host)
        url = "" if self._problem else self._server.url
        mine = {"url": url, "store_problem": self._problem, "clock": time.time()}
        return {**versions_here().told(), **mine, "secret": 0 if self._problem else self._secret.number}

    def learn_secret(self) -> int:
        """Ask the coordinator which secret counts now, and which is about to; gives the number of the one kept here."""
        self._hear_of(_asked(lambda there: there.secret.remote()))
        return self._secret.number

    def own_secret(self) -> Secret:
        """For a coordinator that missed a change of it."""
        return self._secret

    def _hear_of(self, news: News) -> None:
        with self._hearing:
            if news.coming is not None:
                self._server.keyring.accept(news.coming.text, news.overlap_s)
            if news.now.number > self._secret.number:
                keep_old(self._store, self._secret.text, news.overlap_s)
                keep_secret(self._store, news.now.text, news.now.number)
                self._server.keyring.turn(news.now.text, news.overlap_s)
                self._secret = news.now

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
        """Bytes that the store may still take, one at least: what placement weighs this node by."""
        return float(max(1, room_of(self._store.home, node_settings().quota).left))

    def keep(self, manifests: Sequence[bytes], revisions: Sequence[str], survey: dict[str, Any]) -> None:
        """Keep a finished job's manifests, so that this node's ranks need to ask nobody what the dataset is."""
        made = [manifest_from_json(data) for data in manifests]
        for repo in {manifest.repo for manifest in made}:
            for revision in {repo.revision, *revisions}:  # before the names, which say that all of it is here
                self._store.put_survey(RepoRef(repo.repo_id, revision, repo.repo_type), survey)
        for manifest in made:
            put_aside_replaced(self._store, manifest)
            self._store.put_manifest(manifest, tuple(revisions))
            reach("agent.keeping")

    def _neighbours(self) -> Neighbours:
        return _Cluster(self._store, self._node, self._server.url)

    def _locate(self, key: str) -> list[str]:
        if time.monotonic() < self._silent_until:
            return []  # the reader still has the peers in agent.json
        try:
            found = ray.get(coordinator().locate.remote([key]), timeout=LOCATE_TIMEOUT_S)
            return list(found.get(key, []))
        except (ray.exceptions.RayError, CrucibleError):
            self._silent_until = time.monotonic() + SILENT_S
            return []

    def _ask(self, what: str, question: Any) -> Any:
        """The coordinator's answer to a reader's question; None when no coordinator gives one. Raises TypeError."""
        if what == "room":  # not a question for the coordinator: a process of this node needs some
            return self._room(question)
        if what == "figures":
            return self._figures(str(question["what"]), list(question["arguments"]))
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

    def _figures(self, what: str, arguments: list[Any]) -> dict[str, Any] | None:
        """What an admin who only looks is told; None when no coordinator answers. Raises KeyError for anything else."""
        if what not in FIGURES:
            raise KeyError(what)
        try:
            there = coordinator()
            if what == "here":  # this node's line, and all that `crucible status` shows beside it
                asked = [there.care.remote("summary", self._node), there.jobs.remote()]
                cluster, jobs = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
                return {"answer": {**self.status(), "cluster": cluster, "jobs": jobs}}
            call = there.jobs.remote() if what == "jobs" else there.care.remote(what, *arguments)
            return {"answer": ray.get(call, timeout=ANSWER_TIMEOUT_S)}
        except (ray.exceptions.RayError, CrucibleError):
            return None


class _Cluster(Alone):
    """The other nodes, as the coordinator knows them. While none answers, only the sources count, as without one."""

    def __init__(self, store: Store, node: NodeId, url: str) -> None:
        super().__init__(store, node_settings())
        self._node, self._url = node, url

    def elsewhere(self, keys: Sequence[str]) -> set[str]:
        try:
            found = ray.get(coordinator().locate.remote(list(keys)), timeout=ANSWER_TIMEOUT_S)
        except (ray.exceptions.RayError, CrucibleError):
            return set()
        return {key for key, urls in found.items() if any(url != self._url for url in urls)}

    def could_drop(self, keys: Sequence[str]) -> set[str]:
        try:
            call = coordinator().care.remote("could_drop", self._node, list(keys))
            return set(ray.get(call, timeout=DROP_TIMEOUT_S))
        except (ray.exceptions.RayError, CrucibleError):
            return super().could_drop(keys)

    def may_drop(self, keys: Sequence[str]) -> set[str]:
        try:
            return set(ray.get(coordinator().may_drop.remote(self._node, list(keys)), timeout=DROP_TIMEOUT_S))
        except (ray.exceptions.RayError, CrucibleError):
            return super().may_drop(keys)


def _asked(question: Callable[[Any], Any]) -> Any:
    """What the coordinator answers, which may be about to be started again. Raises a RayError."""
    give_up = time.monotonic() + ASK_TIMEOUT_S
    while True:
        try:
            return ray.get(question(coordinator()), timeout=ASK_TIMEOUT_S)
        except (ray.exceptions.RayActorError, ClusterError):
            if time.monotonic() > give_up:
                raise
            time.sleep(RETRY_S)


Agent: Any = ray.remote(num_cpus=0, max_concurrency=16, max_restarts=-1)(AgentCore)
