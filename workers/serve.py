"""The agent's server: a node's shards over ranged HTTP, behind the cluster's secret. The kernel sends the files.

    GET /v1/shards/<key>      the shard's bytes; Range as in RFC 9110
    GET /v1/locate/<key>      {"urls": [...]}: agents that have the shard
    GET /v1/status            what the store holds

Nothing but a key of 64 hex digits becomes part of a path, so nothing outside the store can be asked for. Every request
without the secret gets 401, whether the thing exists or not. Processes that are not Ray workers find the agent by
`agent.json` in the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web

from crucible.cache.store import Store, is_key
from crucible.errors import AgentUnavailable
from crucible.refs import NodeId
from crucible.workers.secret import same_secret

FILE = "agent.json"
START_TIMEOUT_S = 20.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """What `agent.json` says: this node's agent, and the others as far as it knew."""

    url: str
    node: NodeId
    pid: int
    peers: tuple[str, ...] = field(default=())


def read_address(store: Store) -> AgentAddress | None:
    """The agent of this node as the store names it, or None. It may be dead: asking it tells."""
    try:
        raw = json.loads(store.read_small(FILE) or b"")
        return AgentAddress(str(raw["url"]), NodeId(raw["node"]), int(raw["pid"]), tuple(raw["peers"]))
    except (ValueError, KeyError, TypeError):
        return None


def write_address(store: Store, address: AgentAddress) -> None:
    record = {"url": address.url, "node": address.node, "pid": address.pid, "peers": list(address.peers)}
    store.write_small(FILE, json.dumps(record).encode())


class AgentServer:
    """Serves one store until `close()`. The event loop runs in a thread of its own.

    `locate(key)` gives urls of agents that may have a shard; it is called in a worker thread and may block shortly.
    """

    def __init__(
        self, store: Store, secret: str, node: NodeId, host: str, port: int, locate: Callable[[str], list[str]]
    ) -> None:
        self._store, self._secret, self._node, self._locate = store, secret, node, locate
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._stop = asyncio.Event()
        self.url = ""
        self._thread = threading.Thread(target=self._run, args=(host, port), name="crucible-agent", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S) or self._failure is not None:
            raise AgentUnavailable(node, f"cannot listen on {host}:{port} ({self._failure or 'timed out'})")

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(START_TIMEOUT_S)

    def _run(self, host: str, port: int) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(host, port))
        finally:
            self._loop.close()

    async def _serve(self, host: str, port: int) -> None:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/v1/shards/{key}", self._shard)
        app.router.add_get("/v1/locate/{key}", self._where)
        app.router.add_get("/v1/status", self._status)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        try:
            await runner.setup()
            site = web.TCPSite(runner, host, port)
            await site.start()
            shown = f"[{host}]" if ":" in host else host
            self.url = f"http://{shown}:{runner.addresses[0][1]}"
        except OSError as error:
            self._failure = error
            await runner.cleanup()
            return
        finally:
            self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not same_secret(given, self._secret):
            return web.json_response({"error": "the cluster's secret is missing or wrong"}, status=401)
        return await handler(request)

    async def _shard(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        if not is_key(key):
            return web.json_response({"error": "not a shard key"}, status=404)
        path = self._store.shard_path(key)
        if not path.is_file():
            return web.json_response({"error": f"no shard {key[:12]} on this node"}, status=404)
        return web.FileResponse(path, chunk_size=1 << 20)

    async def _where(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        urls = await asyncio.to_thread(self._locate, key) if is_key(key) else []
        return web.json_response({"urls": [url for url in urls if url != self.url]})

    async def _status(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(await asyncio.to_thread(store_status, self._store, self._node, self.url))


def store_status(store: Store, node: NodeId, url: str) -> dict[str, object]:
    """One node's line of `crucible status`: counts and bytes."""
    sizes = [size for _, size in store.shards()]
    return {
        "node": node,
        "url": url,
        "pid": os.getpid(),
        "home": str(store.home),
        "shards": len(sizes),
        "bytes": sum(sizes),
        "free_bytes": store.free_bytes(),
    }
