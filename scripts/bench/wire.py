"""Bytes per second and processor seconds per gigabyte of `crucible.hub.wire`, beside httpx's own transport.

Example: python scripts/bench/wire.py --megabytes 800 --rounds 5

A server of its own (aiohttp's FileResponse: kernel sendfile) on loopback serves one file that is in the page cache.
The cases run one after another within a round, so that a busy neighbour slows them alike; printed are medians, and
each case's speed relative to httpx in the same round. Quote ratios. CPU is this process's, all threads; the server's
is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import hashlib
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import httpx

from crucible.hub.wire import BUFFER_BYTES, chunks, client

Case = Callable[[str, int], None]


def serve(path: Path) -> None:
    """Serve the file until standard input ends; the first line of output is the port."""
    from aiohttp import web

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/file", lambda _: web.FileResponse(path))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await runner.cleanup()

    asyncio.run(main())


def plain(url: str, _target: int) -> None:
    with httpx.Client(timeout=10, trust_env=False) as http, http.stream("GET", url) as reply:
        for _ in reply.iter_raw():
            pass


def plain_to_file(url: str, target: int) -> None:
    with httpx.Client(timeout=10, trust_env=False) as http, http.stream("GET", url) as reply:
        at = 0
        for chunk in reply.iter_raw():
            at += os.pwrite(target, chunk, at)


def plain_hashed(url: str, target: int) -> None:
    digest, at = hashlib.sha256(), 0
    with httpx.Client(timeout=10, trust_env=False) as http, http.stream("GET", url) as reply:
        for chunk in reply.iter_raw():
            digest.update(chunk)
            at += os.pwrite(target, chunk, at)


def discard(size: int) -> Case:
    def run(url: str, _target: int) -> None:
        with client(10) as http, http.stream("GET", url) as reply:
            for _ in chunks(reply, bytearray(size)):
                pass

    return run


def to_file(size: int) -> Case:
    def run(url: str, target: int) -> None:
        at = 0
        with client(10) as http, http.stream("GET", url) as reply:
            for chunk in chunks(reply, bytearray(size)):
                at += os.pwrite(target, chunk, at)

    return run


def hashed(url: str, target: int) -> None:
    digest, at = hashlib.sha256(), 0
    with client(10) as http, http.stream("GET", url) as reply:
        for chunk in chunks(reply):
            digest.update(chunk)
            at += os.pwrite(target, chunk, at)


def followed(url: str, target: int) -> None:
    """One thread receives and writes; another reads back what is written, out of the page cache, and hashes it."""
    written, over, more = [0], [False], threading.Condition()

    def follow() -> None:
        digest, room, at = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES)), 0
        while True:
            with more:
                more.wait_for(lambda upto=at + BUFFER_BYTES: over[0] or written[0] >= upto)
                if written[0] == at:
                    return
                size = min(BUFFER_BYTES, written[0] - at)
            got = os.preadv(target, [room[:size]], at)
            digest.update(room[:got])
            at += got

    follower = threading.Thread(target=follow)
    follower.start()
    told = 0
    with client(10) as http, http.stream("GET", url) as reply:
        at = 0
        for chunk in chunks(reply):
            at += os.pwrite(target, chunk, at)
            if at - told >= BUFFER_BYTES:
                with more:
                    written[0] = told = at
                    more.notify()
    with more:
        written[0], over[0] = at, True
        more.notify()
    follower.join()


def iterated(url: str, _target: int) -> None:
    with client(10) as http, http.stream("GET", url) as reply:
        for _ in reply.iter_raw():
            pass


CASES: dict[str, Case] = {
    "httpx iter_raw, discarded": plain,
    "httpx iter_raw + pwrite": plain_to_file,
    "httpx iter_raw + sha256 + pwrite": plain_hashed,
    "wire iter_raw, discarded": iterated,
    "wire chunks 256 KiB, discarded": discard(256 << 10),
    "wire chunks 1 MiB, discarded": discard(1 << 20),
    "wire chunks 4 MiB, discarded": discard(4 << 20),
    "wire chunks 256 KiB + pwrite": to_file(256 << 10),
    "wire chunks 1 MiB + pwrite": to_file(1 << 20),
    "wire chunks 4 MiB + pwrite": to_file(4 << 20),
    "wire chunks 1 MiB + sha256 + pwrite": hashed,
    "wire chunks 1 MiB + pwrite, sha256 in a thread": followed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument(
        "--profile", action="store_true", help="print where `wire chunks 1 MiB + pwrite` spends its time"
    )
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    with tempfile.TemporaryDirectory() as folder:
        source, size = Path(folder) / "source", options.megabytes * 1_000_000
        source.write_bytes(os.urandom(1 << 20) * (size // (1 << 20)) + bytes(size % (1 << 20)))
        with (
            subprocess.Popen(
                [sys.executable, __file__, "--serve", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as server,
            open(Path(folder) / "target", "w+b") as target,
        ):
            assert server.stdout is not None
            assert server.stdin is not None
            url = f"http://127.0.0.1:{server.stdout.readline().strip()}/file"
            target.write(bytes(size))
            measure(url, target.fileno(), size, options.rounds, options.only)
            if options.profile:
                profiler = cProfile.Profile()
                profiler.runcall(to_file(BUFFER_BYTES), url, target.fileno())
                pstats.Stats(profiler).sort_stats("tottime").print_stats(12)
            server.stdin.close()


def measure(url: str, target: int, size: int, rounds: int, only: str) -> None:
    taken: dict[str, list[tuple[float, float]]] = {
        name: [] for name in CASES if only in name or name == next(iter(CASES))
    }
    for number in range(rounds + 1):  # the first warms the page cache and the imports
        for name in taken:
            wall, cpu = time.perf_counter(), time.process_time()
            CASES[name](url, target)
            if number:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    base = [wall for wall, _ in taken[next(iter(CASES))]]
    print(f"{'case':<48} {'MB/s':>7} {'CPU s/GB':>9} {'x httpx':>8}   walls")
    for name, runs in taken.items():
        walls = [wall for wall, _ in runs]
        speed = size / 1e6 / statistics.median(walls)
        cpu = statistics.median(cpu for _, cpu in runs) / (size / 1e9)
        ratio = statistics.median(plain / wall for plain, wall in zip(base, walls, strict=True))
        print(f"{name:<48} {speed:>7.0f} {cpu:>9.3f} {ratio:>8.2f}   {' '.join(f'{wall:.2f}' for wall in walls)}")


if __name__ == "__main__":
    main()
