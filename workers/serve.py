"""The agent's server: a node's shards over ranged HTTP, behind the cluster's secret. The kernel sends the files.

    GET /v1/shards/<key>      the shard's bytes; Range as in RFC 9110
    GET /v1/locate/<key>      {"urls": [...]}: agents that have the shard
    GET /v1/status            what the store holds
    POST /v1/opening          what a running job has of a request: a reader may begin before the job ends
    POST /v1/figures          what an admin asks of the cluster: tables, as the coordinator has them; changes nothing
    POST /v1/wishes           items that a reader needs next, and which of their shards are made
    PUT /v1/partials/<oid>?size=&lfs=&start=    bytes of a file that another node brings (`workers.partials`)
    POST /v1/partials/<oid>/release             a process of this node goes on with that file
    DELETE /v1/partials/<oid>                   nobody needs them any more

Nothing but a key of 64 hex digits, or an oid of 40 or 64, becomes part of a path, and no link in the store is followed,
so nothing outside the store can be asked for or written. Every request without the secret gets 401, whether the thing
exists or not. What anybody may use of the agent is bounded (`workers.bounds`), in time too. Processes that are not Ray
workers find the agent by `agent.json` in the store.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

from aiohttp import web

from crucible.cache.check import is_unchanged, may_serve
from crucible.cache.store import Store, is_key
from crucible.cache.usage import room_of, usage_of
from crucible.config import node_settings
from crucible.errors import AgentUnavailable, DiskFull, StoreError
from crucible.refs import NodeId, SourceFile
from crucible.versions import HEADER, PROTOCOL
from crucible.workers.bounds import Bounds, Doors, address_of, bounds_here
from crucible.workers.listen import SERVER, Connection, Listener
from crucible.workers.partials import PartialRefused, Partials
from crucible.workers.secret import Keyring
from crucible.workers.sending import ShardResponse, open_inside, span_of
from crucible.workers.spare import PIECE_BYTES, PUSH_BYTES

FILE = "agent.json"
START_TIMEOUT_S = 20.0
WARN_EVERY_S = 30.0
"""Between two lines of the log about requests without the secret."""
EXPIRE_EVERY_S = 2.0
MOST_BYTES = 1 << 50
"""No file is bigger."""
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NUMBER = re.compile(r"[0-9]{1,16}")
_NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[^\[\]{}"]+', re.DOTALL)
P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger("crucible.agent")
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

    It listens on `host` and nothing else, on the first free port of `ports` (0: any), over TLS if it is given a
    context. `locate(key)` gives urls of agents that may have a shard, and `ask(what, question)` the coordinator's
    answer to a reader, or None. They are called in worker threads and may block shortly. `keyring` is what it accepts,
    which may be changed while it serves. Raises AgentUnavailable when it cannot listen.
    """

    def __init__(
        self,
        store: Store,
        secret: str,
        node: NodeId,
        host: str,
        ports: int | tuple[int, int],
        locate: Callable[[str], list[str]],
        ask: Callable[[str, Any], Any] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        bounds: Bounds | None = None,
    ) -> None:
        self._store, self._node, self._locate, self._ask = store, node, locate, ask
        self.keyring = Keyring(secret)
        self._tls, self._bounds = tls, bounds or bounds_here()
        self._doors = Doors(self._bounds)
        self._tarpitted, self._warned_at = 0, float("-inf")
        self._partials = Partials(store, node_settings().quota)
        # threads of their own: the default ones open the shards that are served
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="crucible-partials")
        # to begin with a file may take seconds, in which the ranges of others come in
        self._slow = ThreadPoolExecutor(4, thread_name_prefix="crucible-partials-slow")
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._stop = asyncio.Event()
        self.url = ""
        first, last = (ports, ports) if isinstance(ports, int) else ports
        self._thread = threading.Thread(
            target=self._run, args=(host, range(first, last + 1)), name="crucible-agent", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(START_TIMEOUT_S) or self._failure is not None:
            shown = f"{first}" if first == last else f"any of {first}-{last}"
            raise AgentUnavailable(node, f"cannot listen on {host}:{shown} ({self._failure or 'timed out'})")

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(START_TIMEOUT_S)
        self._pool.shutdown()
        self._slow.shutdown()
        self._partials.close()

    def _run(self, host: str, ports: range) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(host, ports))
        finally:
            self._loop.close()

    async def _serve(self, host: str, ports: range) -> None:
        app = web.Application(middlewares=[self._guard], client_max_size=self._bounds.question_bytes)
        app.router.add_get("/v1/shards/{key}", self._shard)
        app.router.add_get("/v1/locate/{key}", self._where)
        app.router.add_get("/v1/status", self._status)
        app.router.add_post("/v1/{what:opening|wishes|room|figures}", self._question)
        app.router.add_put("/v1/partials/{oid}", self._take)
        app.router.add_post("/v1/partials/{oid}/release", self._release)
        app.router.add_delete("/v1/partials/{oid}", self._drop)
        app.on_response_prepare.append(_sign)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        assert runner.server is not None
        listener = Listener(runner.server, self._bounds, self._doors, self._tls)
        try:
            port = await self._listen(listener, host, ports)
            shown = f"[{host}]" if ":" in host else host
            self.url = f"{'http' if self._tls is None else 'https'}://{shown}:{port}"
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
                await self._off_loop(self._slow, self._partials.expire)
        await listener.close()
        await runner.cleanup()
        await listener.clear()

    async def _listen(self, listener: Listener, host: str, ports: range) -> int:
        """The port that it listens on, the first that is free. Raises OSError."""
        for port in ports:
            try:
                return await listener.open(host, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == ports[-1]:
                    raise
        raise AssertionError("a range of ports has one")

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        connection.began()
        try:
            who, now = address_of(request.remote or ""), time.monotonic()
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self.keyring.good(given):
                return await self._stranger(connection, who, now)
            if not self._doors.request(who, now):
                return _refusal(429, "too many requests from this address", **{"Retry-After": "1"})
            return await handler(request)
        except web.HTTPException:
            raise
        except Exception as error:  # noqa: BLE001 - what a request does to one handler must reach nobody else
            _log.warning("a request of %s failed: %s", request.remote, type(error).__name__, exc_info=error)
            return _refusal(500, "this agent failed; its log says why")
        finally:
            connection.ended()

    async def _stranger(self, connection: Connection, who: str, now: float) -> web.StreamResponse:
        """The one answer to all who do not know the secret. Whoever asks again and again waits for it, or gets none."""
        if self._doors.failed(who, now):
            if now - self._warned_at > WARN_EVERY_S:
                self._warned_at = now
                _log.warning("%s asks this agent again and again without the cluster's secret", who)
            if self._tarpitted >= self._bounds.tarpitted and connection.transport is not None:
                connection.transport.abort()
            else:
                self._tarpitted += 1
                try:
                    await asyncio.sleep(self._bounds.tarpit_s)
                finally:
                    self._tarpitted -= 1
        reply = _refusal(401, "the cluster's secret is missing or wrong", **{"WWW-Authenticate": "Bearer"})
        reply.force_close()
        connection.hurry()  # nobody reads the body that may come with it
        return reply

    async def _shard(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        if not is_key(key):
            return _refusal(404, "not a shard key")
        if not is_unchanged(self._store, key) and not await asyncio.to_thread(may_serve, self._store, key):
            return _refusal(404, f"no shard {key[:12]} on this node whose bytes are right")
        file = open_inside(self._store.shard_path(key))
        if file is None:
            return _refusal(404, f"no shard {key[:12]} on this node")
        size = os.fstat(file.fileno()).st_size
        span = span_of(request.headers.get("range"), size)
        if span is None:
            file.close()
            return _refusal(416, "no such range", **{"Content-Range": f"bytes */{size}"})
        reply = ShardResponse(file, span, size, self._bounds.piece_s, partial="range" in request.headers)
        reply.headers["ETag"] = f'"{key}"'
        await reply.send(request)
        return reply

    async def _where(self, request: web.Request) -> web.StreamResponse:
        key = request.match_info["key"]
        urls = await asyncio.to_thread(self._locate, key) if is_key(key) else []
        return web.json_response({"urls": [url for url in urls if url != self.url]})

    async def _question(self, request: web.Request) -> web.StreamResponse:
        if self._ask is None:
            return _refusal(503, "this agent has no coordinator")
        try:
            async with asyncio.timeout(self._bounds.body_s):
                question = _parsed(await request.read(), self._bounds.depth)
        except TimeoutError:
            return _refusal(408, "the question did not come in time")
        except ValueError as error:
            return _refusal(400, f"the question is not JSON: {error}")
        try:
            answer = await asyncio.to_thread(self._ask, request.match_info["what"], question)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            return _refusal(400, f"no such question: {type(error).__name__}")
        return _refusal(503, "no coordinator answers") if answer is None else web.json_response(answer)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        """A range that another node pushes. The body goes to the disk piece by piece."""
        try:
            file, start, left = _pushed(request)
            # not behind those who wait until they may begin with theirs
            incoming = self._partials.join(file, start)
            if incoming is None:
                incoming = await self._off_loop(self._slow, self._partials.enter, file, start)
        except PartialRefused as error:
            return _refusal(error.status, str(error))
        except StoreError as error:
            return _refusal(507 if isinstance(error, DiskFull) else 500, str(error))
        try:
            while left:
                async with asyncio.timeout(self._bounds.body_s):
                    piece = await request.content.readexactly(min(left, PIECE_BYTES))
                await self._off_loop(self._pool, incoming.write, piece)
                left -= len(piece)
            await self._off_loop(self._pool, incoming.finish)
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
        return await self._let_go(request, self._pool, self._partials.release)

    async def _drop(self, request: web.Request) -> web.StreamResponse:
        return await self._let_go(request, self._slow, self._partials.drop)

    async def _let_go(
        self, request: web.Request, pool: ThreadPoolExecutor, how: Callable[[str], None]
    ) -> web.StreamResponse:
        oid = request.match_info["oid"]
        if not _OID.fullmatch(oid):
            return _refusal(404, "not an oid")
        try:
            await self._off_loop(pool, how, oid)
        except StoreError as error:
            return _refusal(500, str(error))
        return web.Response(status=204)

    def _off_loop(
        self, pool: ThreadPoolExecutor, do: Callable[P, R], *args: P.args, **named: P.kwargs
    ) -> asyncio.Future[R]:
        return self._loop.run_in_executor(pool, lambda: do(*args, **named))

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


def _parsed(data: bytes, depth: int) -> Any:
    """JSON that is no deeper than that. Raises ValueError."""
    # counted before it is parsed: a parser that goes too deep raises in whatever else the process is about to clean up
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in _NO_BRACKETS.sub(b"", data)), default=0) > depth:
        raise ValueError("nested too deeply")
    return json.loads(data)


async def _sign(_: web.Request, reply: web.StreamResponse) -> None:
    reply.headers["Server"] = SERVER
    reply.headers[HEADER] = str(PROTOCOL)


def _refusal(status: int, reason: str, **headers: str) -> web.Response:
    return web.json_response({"error": reason}, status=status, headers=headers)


def store_status(store: Store, node: NodeId, url: str) -> dict[str, object]:
    """One node's line of `crucible status`: counts and bytes. `room_bytes` is what something new may take."""
    size, count = usage_of(store.home).shards()
    room = room_of(store.home, node_settings().quota)
    return {
        "node": node,
        "url": url,
        "pid": os.getpid(),
        "home": str(store.home),
        "shards": count,
        "bytes": size,
        "free_bytes": room.free,
        "quota_bytes": room.limit,
        "room_bytes": max(0, room.left),
    }
