"""The agent's server: a node's shards over ranged HTTP, behind the cluster's secret. The kernel sends the files.

    GET /v1/shards/<key>      the shard's bytes; Range as in RFC 9110
    GET /v1/locate/<key>      {"urls": [...]}: agents that have the shard
    GET /v1/status            what the store holds
    POST /v1/opening          what a running job has of a request: a reader may begin before the job ends
    POST /v1/wishes           items that a reader needs next, and which of their shards are made
    PUT /v1/partials/<oid>?size=&lfs=&start=    bytes of a file that another node brings (`workers.partials`)
    POST /v1/partials/<oid>/release             a process of this node goes on with that file
    DELETE /v1/partials/<oid>                   nobody needs them any more

Nothing but a key of 64 hex digits, or an oid of 40 or 64, becomes part of a path, so nothing outside the store can be
asked for or written. Every request without the secret gets 401, whether the thing exists or not. Processes that are not
Ray workers find the agent by `agent.json` in the store.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from aiohttp import web

from crucible.cache.store import Store, is_key
from crucible.errors import AgentUnavailable, DiskFull, StoreError
from crucible.refs import NodeId, SourceFile
from crucible.workers.partials import PartialRefused, Partials
from crucible.workers.secret import same_secret
from crucible.workers.spare import PIECE_BYTES, PUSH_BYTES

FILE = "agent.json"
START_TIMEOUT_S = 20.0
PIECE_TIMEOUT_S = 10.0
"""For one piece of a range that is pushed here to arrive."""
EXPIRE_EVERY_S = 2.0
MOST_BYTES = 1 << 50
"""No file is bigger."""
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NUMBER = re.compile(r"[0-9]{1,16}")
P = ParamSpec("P")
R = TypeVar("R")
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

    `locate(key)` gives urls of agents that may have a shard, and `ask(what, question)` the coordinator's answer to a
    reader, or None. They are called in worker threads and may block shortly.
    """

    def __init__(
        self,
        store: Store,
        secret: str,
        node: NodeId,
        host: str,
        port: int,
        locate: Callable[[str], list[str]],
        ask: Callable[[str, Any], Any] | None = None,
    ) -> None:
        self._store, self._secret, self._node, self._locate, self._ask = store, secret, node, locate, ask
        self._partials = Partials(store)
        # threads of their own: the default ones open the shards that are served
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="crucible-partials")
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
        self._pool.shutdown()
        self._partials.close()

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
        app.router.add_post("/v1/{what:opening|wishes}", self._question)
        app.router.add_put("/v1/partials/{oid}", self._take)
        app.router.add_post("/v1/partials/{oid}/release", self._release)
        app.router.add_delete("/v1/partials/{oid}", self._drop)
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
        while not self._stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), EXPIRE_EVERY_S)
            with suppress(StoreError):
                await self._off_loop(self._partials.expire)
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

    async def _question(self, request: web.Request) -> web.StreamResponse:
        if self._ask is None:
            return _refusal(503, "this agent has no coordinator")
        try:
            question = await request.json()
        except ValueError:
            return _refusal(400, "the question is not JSON")
        try:
            answer = await asyncio.to_thread(self._ask, request.match_info["what"], question)
        except (TypeError, KeyError, ValueError) as error:
            return _refusal(400, f"no such question: {error}")
        return _refusal(503, "no coordinator answers") if answer is None else web.json_response(answer)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        """A range that another node pushes. The body goes to the disk piece by piece."""
        try:
            file, start, left = _pushed(request)
            incoming = await self._off_loop(self._partials.enter, file, start)
        except PartialRefused as error:
            return _refusal(error.status, str(error))
        except StoreError as error:
            return _refusal(507 if isinstance(error, DiskFull) else 500, str(error))
        try:
            while left:
                async with asyncio.timeout(PIECE_TIMEOUT_S):
                    piece = await request.content.readexactly(min(left, PIECE_BYTES))
                await self._off_loop(incoming.write, piece)
                left -= len(piece)
            await self._off_loop(incoming.finish)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return _refusal(400, "the body ended before its announced length")
        except PartialRefused as error:
            return _refusal(error.status, str(error))
        except StoreError as error:
            return _refusal(507 if isinstance(error, DiskFull) else 500, str(error))
        finally:
            self._pool.submit(self._partials.leave, incoming)
        return web.Response(status=204)

    async def _release(self, request: web.Request) -> web.StreamResponse:
        return await self._let_go(request, self._partials.release)

    async def _drop(self, request: web.Request) -> web.StreamResponse:
        return await self._let_go(request, self._partials.drop)

    async def _let_go(self, request: web.Request, how: Callable[[str], None]) -> web.StreamResponse:
        oid = request.match_info["oid"]
        if not _OID.fullmatch(oid):
            return _refusal(404, "not an oid")
        try:
            await self._off_loop(how, oid)
        except StoreError as error:
            return _refusal(500, str(error))
        return web.Response(status=204)

    def _off_loop(self, do: Callable[P, R], *args: P.args, **named: P.kwargs) -> asyncio.Future[R]:
        return self._loop.run_in_executor(self._pool, lambda: do(*args, **named))

    async def _status(self, _: web.Request) -> web.StreamResponse:
        return web.json_response(await asyncio.to_thread(store_status, self._store, self._node, self.url))


def _pushed(request: web.Request) -> tuple[SourceFile, int, int]:
    """(file, start, length) of a range that is pushed here. Raises PartialRefused for what makes no sense."""
    oid, query, length = request.match_info["oid"], request.query, request.content_length
    if not _OID.fullmatch(oid):
        raise PartialRefused(404, "not an oid")
    given = [query.get(name, "") for name in ("size", "start", "lfs")]
    if not all(map(_NUMBER.fullmatch, given)):
        raise PartialRefused(400, "size, start and lfs must be numbers")
    size, start, lfs = map(int, given)
    if size > MOST_BYTES or lfs != (len(oid) == 64):
        raise PartialRefused(400, "there is no such file")
    if length is None:
        raise PartialRefused(411, "the length must be announced")
    if length > PUSH_BYTES:
        raise PartialRefused(413, f"one range has at most {PUSH_BYTES} bytes")
    if not 0 <= start < start + length <= size:
        raise PartialRefused(416, f"bytes {start} to {start + length} are not in a file of {size}")
    return SourceFile(oid, size, oid, bool(lfs)), start, length


def _refusal(status: int, reason: str) -> web.Response:
    return web.json_response({"error": reason}, status=status)


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
