"""Start and stop a local Hub: in this process beside other work (`HubServer`), or as the whole process (`serve`)."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from aiohttp import web
from aiohttp.typedefs import Middleware

from .app import cdn_app, hub_app
from .call import Hub
from .log import RequestLog, RequestRecord
from .options import HubOptions
from .repos import Store
from .signing import Signer

START_S = 30.0  # bound on starting and on stopping
SETTLE_S = 0.5  # how long `.log` waits for replies that are just ending


class HubServer:
    """A Hub over the folder `root`, served from a background thread until `close`.

    Ports 0 are chosen by the kernel; blobs come from `cdn_endpoint`, another origin. `middlewares` see requests
    to both origins before quotas and errors do (aiohttp's kind; `request.app[ORIGIN]` tells which).

    Concurrency: methods may be called from any thread. Repos may be imported into `root` while it is served, by
    this or another process.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        cdn_port: int = 0,
        options: HubOptions | None = None,
        middlewares: Sequence[Middleware] = (),
    ) -> None:
        self.options = options or HubOptions()
        self.store = Store(root)
        self.host, self.port, self.cdn_port = host, port, cdn_port
        self._requests = RequestLog(self.options.log_path, keep=self.options.log_keep)
        self._middlewares = middlewares
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="crucible-hub", daemon=True)
        self._thread.start()
        if not self._ready.wait(START_S):
            raise TimeoutError(f"the Hub did not start in {START_S:g} s")
        if self._failure is not None:
            self._thread.join(START_S)
            raise self._failure

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT should be, from this machine."""
        return f"http://{self._named_host}:{self.port}"

    @property
    def cdn_endpoint(self) -> str:
        return f"http://{self._named_host}:{self.cdn_port}"

    @property
    def _named_host(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104
        return f"[{host}]" if ":" in host else host

    @property
    def log(self) -> list[RequestRecord]:
        """The requests so far, in the order they came.

        A client can have its last byte before the server has noted it, so this waits, for half a second
        at most, until no reply is on its way. What is still on its way then has `done=False`.
        """
        deadline = time.monotonic() + SETTLE_S
        while self._requests.open and time.monotonic() < deadline:
            time.sleep(0.002)
        return self._requests.records()

    def clear_log(self) -> None:
        _ = self.log
        self._requests.clear()

    def close(self) -> None:
        """Stop serving; open connections are cut. May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(START_S)
        self._requests.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits in __init__
            self._failure = error
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            self._ready.set()

    async def _serve(self) -> None:
        hub = Hub(self.store, self.options, Signer(secrets.token_bytes(32)))
        runners: list[web.AppRunner] = []
        try:
            cdn = web.AppRunner(cdn_app(hub, self._requests, self._middlewares), access_log=None, shutdown_timeout=0.2)
            runners.append(cdn)
            self.cdn_port = await self._listen(cdn, self.cdn_port)
            app = hub_app(hub, self._requests, self._middlewares, self.cdn_port)
            runners.append(web.AppRunner(app, access_log=None, shutdown_timeout=0.2))
            self.port = await self._listen(runners[-1], self.port)
            self._ready.set()
            await self._stop.wait()
        finally:
            for runner in runners:
                await runner.cleanup()

    async def _listen(self, runner: web.AppRunner, port: int) -> int:
        await runner.setup()
        await web.TCPSite(runner, self.host, port).start()
        return int(runner.addresses[0][1])


def serve(
    root: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    cdn_port: int = 0,
    options: HubOptions | None = None,
    ready: Callable[[HubServer], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM. `ready` is called once the ports are open (to print the endpoint)."""
    stopped = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    with HubServer(root, host=host, port=port, cdn_port=cdn_port, options=options) as server:
        before = [signal.signal(number, lambda *_: stopped.set()) for number in signals]
        try:
            if ready is not None:
                ready(server)
            while not stopped.wait(1.0):  # a bounded wait lets Python run the signal handler
                pass
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
