"""The two aiohttp applications: the Hub's origin and the origin that serves blobs.

Order of the layers, outermost first: the request log (which also sends the reply, so that it can count), the
caller's own middlewares, then quotas and errors, then the handler. Replies are unsent when they pass a
middleware, so a middleware may replace them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from .access import Redirect, Refusal, User, bearer
from .api import answer
from .blob import BlobResponse, MadeResponse, blob_reply
from .call import Call, Hub
from .git import git_reply
from .lfs import CONTENT_TYPE, batch
from .log import Entry, Origin, RequestLog, RequestRecord
from .ratelimit import RateLimiter, bucket_of
from .resolve import Bytes, resolve
from .route import parse

logger = logging.getLogger(__name__)

BODY_MOST = 16 << 20  # bytes of a POST that are read into memory
ORIGIN: web.AppKey[Origin] = web.AppKey("origin", str)  # type: ignore[arg-type]
# One task handles one request at a time, so what belongs to a request may live in its context.
LOG_ENTRY: ContextVar[Entry] = ContextVar("log_entry")
CALLER: ContextVar[User | None] = ContextVar("caller")


def raw_path(request: web.BaseRequest) -> str:
    """The path as it came on the wire, without the query."""
    target = request.raw_path
    if not target.startswith("/"):  # a proxy's absolute form
        target = "/" + target.partition("://")[2].partition("/")[2]
    return target.partition("?")[0]


def hub_app(hub: Hub, log: RequestLog, middlewares: Sequence[Middleware], cdn_port: int) -> web.Application:
    limiter = RateLimiter(hub.options.limits)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Quotas and errors: every reply says what is left, every error says why in its headers."""
        token = bearer(request.headers.get("Authorization"))
        user = hub.options.tokens.get(token) if token is not None else None
        caller = f"user:{user.name}" if user else f"ip:{request.remote}"
        verdict = limiter.spend(caller, bucket_of(raw_path(request)), hub.options.clock())
        CALLER.set(user)
        try:
            if token is not None and user is None:
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            if not verdict.allowed:
                raise Refusal(429, "", "Too many requests: this caller's quota is used up. Wait as RateLimit says.")
            reply = await handler(request)
        except Refusal as refusal:
            reply = refusal_reply(refusal)
        except Redirect as redirect:
            reply = web.Response(
                status=307,
                text=f"Temporary Redirect. Redirecting to {redirect.location}",
                headers={"Location": redirect.location},
            )
        if reply.status == 401 and parse(raw_path(request)).kind in ("git", "lfs"):
            reply.headers["WWW-Authenticate"] = 'Basic realm="a crucible Hub: any name, and a token as the password"'
        reply.headers.update(verdict.headers)
        return reply

    async def handle(request: web.Request) -> web.StreamResponse:
        base, cdn_base = _bases(hub, request, cdn_port)
        path = raw_path(request)
        route = parse(path)
        user = CALLER.get()
        body = await _body(request) if route.kind != "git" else {}
        call = Call(
            hub,
            route,
            request.method,
            path,
            request.rel_url.raw_query_string,
            request.query,
            body,
            user,
            base,
            cdn_base,
        )
        if route.kind in ("file", "cached-file"):
            found = await asyncio.to_thread(resolve, call)
            if isinstance(found, Bytes):
                return blob_reply(request, found.path, found.size, found.etag, found.headers)
            return web.Response(
                status=found.status, text=f"Redirecting to {found.headers['Location']}", headers=found.headers
            )
        if route.kind == "git":
            protocol, asked = request.headers.get("Git-Protocol", ""), await request.read()
            made = await asyncio.to_thread(git_reply, call, protocol, asked)
            return MadeResponse(made.pieces, headers=made.headers)
        if route.kind == "lfs":
            told = await asyncio.to_thread(batch, call)
            return web.json_response(told, content_type=CONTENT_TYPE)
        if route.kind == "page":
            return web.Response(text="A crucible Hub. Point HF_ENDPOINT here; there are no pages for people.\n")
        said = await asyncio.to_thread(answer, call)
        return web.json_response(said.body, status=said.status, headers=said.headers)

    return _app("hub", hub, log, [*middlewares, guard], handle)


def cdn_app(hub: Hub, log: RequestLog, middlewares: Sequence[Middleware]) -> web.Application:
    async def handle(request: web.Request) -> web.StreamResponse:
        path = raw_path(request)
        found = re.match(r"/blobs/([0-9a-f]{64})/", path)
        if found is None or request.method not in ("GET", "HEAD"):
            return refusal_reply(Refusal(404, "", "NoSuchKey"))
        why = hub.signer.refusal(path, request.rel_url.raw_query_string, now=hub.options.clock())
        if why is not None:
            return refusal_reply(Refusal(403, "", why))
        blob = hub.store.blob_path(found[1])
        try:
            size = (await asyncio.to_thread(blob.stat)).st_size
        except FileNotFoundError:
            return refusal_reply(Refusal(404, "", "NoSuchKey"))
        headers = {"Content-Type": "application/octet-stream", "Cache-Control": "public, max-age=31536000, immutable"}
        return blob_reply(request, blob, size, found[1], headers)

    return _app("cdn", hub, log, middlewares, handle)


def refusal_reply(refusal: Refusal) -> web.Response:
    """An error as the Hub sends it: the headers say all, for HEAD has no body."""
    headers = {**refusal.headers, "X-Error-Message": re.sub(r"[^\x20-\x7e]", "?", refusal.message)}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return web.json_response({"error": refusal.message}, status=refusal.status, headers=headers)


def _app(
    origin: Origin, hub: Hub, log: RequestLog, middlewares: Sequence[Middleware], handler: Handler
) -> web.Application:
    app = web.Application(middlewares=[_logged(origin, hub, log), *middlewares], client_max_size=BODY_MOST)
    app[ORIGIN] = origin
    app.router.add_route("*", "/{anything:.*}", handler)
    return app


def _logged(origin: Origin, hub: Hub, log: RequestLog) -> Middleware:
    @web.middleware
    async def logged(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = raw_path(request)
        entry = log.begin(
            RequestRecord(
                time=hub.options.clock(),
                method=request.method,
                path=path,
                range=request.headers.get("Range"),
                had_token="Authorization" in request.headers,
                status=0,
                sent=0,
                origin=origin,
                bucket=bucket_of(path) if origin == "hub" else "cdn",
                done=False,
                user_agent=request.headers.get("User-Agent", ""),
            )
        )
        LOG_ENTRY.set(entry)
        status = 0
        try:
            reply = await _answered(request, handler)
            reply.headers.setdefault("X-Request-Id", secrets.token_hex(12))
            status = reply.status
            await _send(request, reply, entry)
            return reply
        finally:
            log.end(entry, status)

    return logged


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        return refusal_reply(Refusal(error.status, "", error.reason))
    except Exception:  # a defect of ours must not look like a broken connection
        logger.exception("%s %s", request.method, raw_path(request))
        return refusal_reply(Refusal(500, "", "Internal error of this Hub; its log has the details."))


async def _send(request: web.Request, reply: web.StreamResponse, entry: Entry) -> None:
    """Send the reply here rather than in aiohttp, so that the log knows what left."""
    if isinstance(reply, (BlobResponse, MadeResponse)):
        reply.on_sent = entry.sent
    try:
        await reply.prepare(request)
        await reply.write_eof()
    except OSError as error:  # the client went away, or the disk failed: the body cannot be completed either way
        logger.info("%s %s ended early: %s", request.method, raw_path(request), error)
        if request.transport is not None:
            request.transport.abort()
        return
    if isinstance(reply, web.Response) and request.method != "HEAD" and isinstance(reply.body, (bytes, bytearray)):
        entry.sent(len(reply.body))


def _bases(hub: Hub, request: web.Request, cdn_port: int) -> tuple[str, str]:
    """How the client names the two origins: as it named this one, unless the options know better."""
    host = request.host if re.fullmatch(r"[\w.:\[\]-]+", request.host) else "localhost"
    name = re.sub(r":\d+$", "", host)
    base = hub.options.public_url or f"{request.scheme}://{host}"
    return base.rstrip("/"), (hub.options.public_cdn_url or f"http://{name}:{cdn_port}").rstrip("/")


async def _body(request: web.Request) -> Mapping[str, Any]:
    if request.method != "POST":
        return {}
    if request.content_type in ("application/json", CONTENT_TYPE):
        try:
            body = await request.json()
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise Refusal(400, "", "the body is not JSON") from None
        return body if isinstance(body, dict) else {}
    form = await request.post()
    return {key: [value for value in form.getall(key) if isinstance(value, str)] for key in form}
