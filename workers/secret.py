"""The cluster's secret: what a peer must know before an agent gives it anything. A file on each node, mode 0600.

Never in an argument of a command, an environment variable or a log: the coordinator makes it, agents ask the
coordinator for it, and the processes of a node read it from the node's store. A file that others may read or write is
refused by name: what it says may be known, or not be ours.

A new secret (`crucible rotate-secret`) has a higher number. For a while the agents accept the old one too, so that
no reader fails which read the file before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from crucible.cache.store import Store
from crucible.config import Token
from crucible.errors import StoreError

FILE = "secret"
OLD_FILE = "secret.old"
HANDED_OVER = "token-"
"""How the name of a file begins by which a driver hands its token over."""
MOST_BYTES = 4096
ENTROPY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Secret:
    """A cluster's secret and which one it is: each rotation counts one up."""

    text: str = field(repr=False)
    number: int = 1


@dataclass(frozen=True, slots=True)
class News:
    """What the coordinator says of the secret: the one that counts, and one that is about to."""

    now: Secret
    coming: Secret | None
    overlap_s: float
    """How long the one before is accepted yet."""


def new_secret(number: int = 1) -> Secret:
    """A secret that nobody can guess."""
    return Secret(secrets.token_urlsafe(ENTROPY_BYTES), number)


def ensure_secret(store: Store) -> str:
    """The node's secret; made now if there is none. Raises StoreError for a file that others may read."""
    return ensure_numbered(store).text


def ensure_numbered(store: Store) -> Secret:
    """As `ensure_secret`, with its number."""
    if (known := load_numbered(store)) is not None:
        return known
    with store.lock("secret"):
        if (known := load_numbered(store)) is not None:
            return known
        made = new_secret()
        keep_secret(store, made.text, made.number)
        return made


def keep_secret(store: Store, secret: str, number: int = 1) -> None:
    """Write the secret for this node's processes, mode 0600."""
    store.write_small(FILE, f"{secret} {number}\n".encode(), mode=0o600)


def load_secret(store: Store) -> str | None:
    """What this node's file says, or None where there is none. Raises StoreError for a file that others may read."""
    known = load_numbered(store)
    return None if known is None else known.text


def load_numbered(store: Store) -> Secret | None:
    """As `load_secret`, with its number."""
    words = (read_private(store.home / FILE) or b"").decode("ascii", "replace").split()
    if not words:
        return None
    return Secret(words[0], int(words[1]) if len(words) > 1 and words[1].isdecimal() else 1)


def read_private(path: Path) -> bytes | None:
    """A small file that only its user may read; None where we may not, or there is none.

    Raises StoreError for one that others may read or write, with what to do.
    Its user is this one; for root also the one whose folder it is in, as a container's root reads what its daemon made.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        raise StoreError(str(path), f"cannot be read ({error.strerror}), and no link is followed there") from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise StoreError(str(path), "is no regular file; remove it, it is made anew")
        if facts.st_uid != os.geteuid() and (os.geteuid() or facts.st_uid != os.stat(path.parent).st_uid):
            raise StoreError(
                str(path),
                f"belongs to user {facts.st_uid}, and this process is user {os.geteuid()}; chown or remove it",
            )
        if facts.st_mode & 0o077:
            mode = stat.S_IMODE(facts.st_mode)
            todo = f"chmod 600 {path}, then `crucible rotate-secret`, as they may have done so"
            raise StoreError(str(path), f"has mode {mode:04o}, so others may read it; {todo}")
        return os.read(descriptor, MOST_BYTES)
    finally:
        os.close(descriptor)


def _digest(text: str) -> bytes:
    """What is compared: of one length, whatever the lengths."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


class Keyring:
    """What an agent accepts: the cluster's secret, and for a bounded time another one. Concurrency: any thread."""

    def __init__(self, secret: str) -> None:
        self._lock = threading.Lock()
        self._good: dict[bytes, float | None] = {_digest(secret): None}

    def accept(self, secret: str, for_s: float) -> None:
        """This one too, for so many seconds."""
        with self._lock:
            if self._good.get(_digest(secret), 0.0) is not None:
                self._good[_digest(secret)] = time.monotonic() + for_s

    def turn(self, secret: str, overlap_s: float) -> None:
        """From now on this one; what was good until now, for `overlap_s` more at most."""
        until, new = time.monotonic() + overlap_s, _digest(secret)
        with self._lock:
            self._good = {old: until if at is None else min(at, until) for old, at in self._good.items()} | {new: None}

    def good(self, given: str) -> bool:
        """True for a secret that is accepted now. Each is compared in constant time, and always all of them."""
        digest, now = _digest(given), time.monotonic()
        with self._lock:
            self._good = {known: until for known, until in self._good.items() if until is None or until > now}
            return sum(hmac.compare_digest(digest, known) for known in self._good) > 0


def keep_old(store: Store, secret: str, overlap_s: float) -> None:
    """Note until when the agent of this node accepts an old secret, should it be started again before."""
    record = {"secret": secret, "until": time.time() + overlap_s, "overlap": overlap_s}
    store.write_small(OLD_FILE, json.dumps(record).encode(), mode=0o600)


def load_old(store: Store) -> tuple[str, float] | None:
    """(old secret, seconds that it is accepted for yet), or None. Removes a note that is over."""
    path = store.home / OLD_FILE
    try:
        record = json.loads(read_private(path) or b"")
        left = min(float(record["until"]) - time.time(), float(record["overlap"]))  # a clock that was set back
        secret = str(record["secret"])
    except (ValueError, KeyError, TypeError, StoreError):
        return None
    if left > 0:
        return secret, left
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def take_token(path: str | None) -> Token | None:
    """Read the driver's token from a 0600 file on this node and remove it: so it is in no argument of any call.

    None when there is none, or when the driver is on another machine: the nodes' own tokens are used then.
    """
    if path is None or not Path(path).name.startswith(HANDED_OVER):
        return None  # whoever speaks to the coordinator could else have any file of this node read and removed
    try:
        token = Token((read_private(Path(path)) or b"").decode("utf-8", "replace").strip())
        Path(path).unlink(missing_ok=True)
    except OSError:
        return None
    return token or None
