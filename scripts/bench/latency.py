"""A link with latency, in user space: a TCP relay for machines whose kernel has no netem.

Example: python scripts/bench/latency.py --to 127.0.0.1:8080 --listen 9080 --rtt-ms 20 --window 4194304

Every byte comes out half a round trip after it went in. A connection behaves like TCP over such a line: the handshake
costs one round trip, and no more than a window of bytes is under way without having been acknowledged, so a connection
carries at most window / rtt. The window opens as in slow start, from 14,600 bytes, doubling every round trip. Not
modelled: loss, a bandwidth that connections share, windows that close again while a connection rests. Bytes are copied
twice by this process, which bounds all connections together to a gigabyte or two a second.

Runs until Ctrl-C, SIGTERM, or the end of its standard input. Prints one line of JSON, the ports, when it listens.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress

FIRST_WINDOW = 14_600
"""Ten segments: what Linux sends before the first acknowledgement."""
PIECE = 256 << 10
Address = tuple[str, int]


class Direction:
    """One direction of one connection: a thread that reads, and a thread that writes when the time has come.

    `born` is the earliest moment (monotonic) at which the first byte can have left the sender.
    """

    def __init__(self, source: socket.socket, sink: socket.socket, delay_s: float, window: int, born: float) -> None:
        self._source, self._sink, self._delay, self._limit, self._born = source, sink, delay_s, window, born
        self._window = min(window, FIRST_WINDOW)
        self._under_way = 0
        self._line: deque[tuple[float, bytes]] = deque()  # (when it arrives, bytes); b"" is the end
        self._acks: deque[tuple[float, int]] = deque()  # (when the sender hears of it, bytes)
        self._changed = threading.Condition()
        self._broken = False
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()

    def _read(self) -> None:
        data = b"?"
        while data:
            room = self._room()
            try:
                data = self._source.recv(min(room, PIECE)) if room else b""
            except OSError:
                data = b""
            with self._changed:
                self._line.append((max(time.monotonic(), self._born) + self._delay, data))
                self._under_way += len(data)
                self._changed.notify_all()

    def _room(self) -> int:
        """Bytes that may be put on the line now; waits until it is worth it. 0 when the other end is gone."""
        while True:
            with self._changed:
                if self._broken:
                    return 0
                now = time.monotonic()
                while self._acks and self._acks[0][0] <= now:
                    size = self._acks.popleft()[1]
                    self._under_way -= size
                    self._window = min(self._limit, self._window + size)
                room = self._window - self._under_way
                if room >= min(self._window // 4, PIECE):  # as TCP does: no silly little windows
                    return room
                self._changed.wait(max(0.0, self._acks[0][0] - now) if self._acks else 1.0)

    def _write(self) -> None:
        data = b"?"
        while data:
            with self._changed:
                while not self._line:
                    self._changed.wait(1.0)
                when, data = self._line.popleft()
            time.sleep(max(0.0, when - time.monotonic()))
            try:
                if data:
                    self._sink.sendall(data)
                else:
                    self._sink.shutdown(socket.SHUT_WR)
            except OSError:
                data = b""
                with suppress(OSError):
                    self._source.shutdown(socket.SHUT_RD)  # wakes the reader
            with self._changed:
                self._broken = not data
                self._acks.append((time.monotonic() + self._delay, len(data)))
                self._changed.notify_all()


def relay(listener: socket.socket, target: Address, delay_s: float, window: int) -> None:
    """Accept for ever. Each connection lives in threads of its own, and ends when both directions have."""
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        try:
            far = socket.create_connection(target, timeout=10)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        now = time.monotonic()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        Direction(near, far, delay_s, window, now + 2 * delay_s)  # the sender first had to shake hands
        Direction(far, near, delay_s, window, now)


def listen(port: int = 0) -> socket.socket:
    """A listening socket on loopback; port 0 is any free one."""
    return socket.create_server(("127.0.0.1", port), backlog=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", action="append", required=True, metavar="HOST:PORT", help="repeatable")
    parser.add_argument("--listen", action="append", type=int, default=[], metavar="PORT", help="one for each --to")
    parser.add_argument("--fd", action="append", type=int, default=[], help="inherited listening socket, for each --to")
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--window", type=int, default=4 << 20, help="bytes under way in a connection (default 4 MiB)")
    options = parser.parse_args()
    sockets = [socket.socket(fileno=fd) for fd in options.fd]
    sockets += [listen(port) for port in options.listen or [0] * (len(options.to) - len(sockets))]
    if len(sockets) != len(options.to):
        parser.error("give as many --listen or --fd as --to")
    for listener, to in zip(sockets, options.to):
        host, _, port = to.rpartition(":")
        rest = ((host, int(port)), options.rtt_ms / 2000, options.window)
        threading.Thread(target=relay, args=(listener, *rest), daemon=True).start()
    print(json.dumps({"ports": [listener.getsockname()[1] for listener in sockets]}), flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        while sys.stdin.buffer.read(1 << 10):
            pass


if __name__ == "__main__":
    main()
