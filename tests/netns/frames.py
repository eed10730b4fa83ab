"""Carry frames between two links and deliver each later: `netem delay` for a kernel that has none. Run as a program.

    python frames.py port far 0.02      until its standard input ends

With the header that says what the kernel has left to be done (checksums, segments), so big frames stay big.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

_ALL = 0x0003
_SOL_PACKET, _VNET_HDR, _IGNORE_OUTGOING = 263, 15, 23
_MOST = 1 << 17


def _link(name: str) -> socket.socket:
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    link.setsockopt(_SOL_PACKET, _VNET_HDR, 1)
    link.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
    link.bind((name, _ALL))
    link.setblocking(False)
    return link


def carry(links: tuple[socket.socket, socket.socket], lag_s: float) -> None:
    """Until the standard input ends."""
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    other = {links[0]: links[1], links[1]: links[0]}
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready = select.select([*links, sys.stdin], [], [], wait)[0]
        if sys.stdin in ready:
            return
        for link in (one for one in links if one in ready):
            try:
                while True:
                    waiting.append((time.monotonic() + lag_s, other[link], link.recv(_MOST)))
            except BlockingIOError:
                pass
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, link, frame = waiting.popleft()
            try:
                link.send(frame)
            except OSError:  # a full queue drops frames, as a line does; TCP sends them again
                continue


if __name__ == "__main__":
    first, second = _link(sys.argv[1]), _link(sys.argv[2])
    print("up", flush=True)
    carry((first, second), float(sys.argv[3]))
