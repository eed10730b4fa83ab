"""Whether anything listens where a Ray cluster or an agent is said to be."""

from __future__ import annotations

import socket

REACH_TIMEOUT_S = 5.0
"""How long an address may take to accept a connection."""


def check_listens(address: str) -> None:
    """Raise OSError when nothing accepts a connection at `host:port` or `ray://host:port`; the rest is left to Ray.

    Ray 2.60 itself tries a dead address for ten minutes and more, and prints a warning every few seconds.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()


def listens(url: str) -> bool:
    """False when what `url` names has gone: `agent.json` outlives an agent that was killed."""
    try:
        check_listens(url)
    except OSError:
        return False
    return True
