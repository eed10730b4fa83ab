"""The cluster's secret: what a peer must know before an agent gives it anything. A file on each node, mode 0600.

Never in an argument of a command, an environment variable or a log: the coordinator makes it, agents ask the
coordinator for it, and the processes of a node read it from the node's store.
"""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

from crucible.cache.store import Store
from crucible.config import Token

FILE = "secret"


def ensure_secret(store: Store) -> str:
    """The node's secret; made now if there is none."""
    if (known := load_secret(store)) is not None:
        return known
    with store.lock("secret"):
        if (known := load_secret(store)) is not None:
            return known
        secret = secrets.token_urlsafe(32)
        keep_secret(store, secret)
        return secret


def keep_secret(store: Store, secret: str) -> None:
    """Write the secret for this node's processes, mode 0600."""
    store.write_small(FILE, secret.encode(), mode=0o600)


def load_secret(store: Store) -> str | None:
    data = store.read_small(FILE)
    return data.decode("ascii", "replace").strip() or None if data else None


def same_secret(given: str, secret: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(given.encode(), secret.encode())


def take_token(path: str | None) -> Token | None:
    """Read the driver's token from a 0600 file on this node and remove it: so it is in no argument of any call.

    None when there is none, or when the driver is on another machine: the nodes' own tokens are used then.
    """
    if path is None:
        return None
    try:
        token = Token(Path(path).read_text().strip())
        Path(path).unlink(missing_ok=True)
    except OSError:
        return None
    return token or None
