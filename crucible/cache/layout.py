"""Which layout a store has, and how one of an older layout becomes ours. Runs whenever a store is opened.

`VERSION` names the layout; it is written last, so a migration that was interrupted is begun again. A migration is a
function over the store's folder that may run twice, looks at nothing that it does not know, and leaves that alone.
Raises StoreVersion for a layout that is newer, or that nobody knows: such a store is not touched. StoreError: for one
that this user may not read.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from crucible.cache.disk import LOCK_WAIT_S, disk_errors
from crucible.errors import StoreError, StoreVersion

LAYOUT = "1"
"""Of the stores that this crucible writes."""

Migration = tuple[str, Callable[[Path], None]]
"""(the layout that it leads to, what does it)."""

MIGRATIONS: Mapping[str, Migration] = {}
"""By the layout that a store has. Layout 1 is the first one, so nothing is older yet."""


def found_layout(home: Path) -> str | None:
    """What `VERSION` says; None where there is no store yet, or its disk fails.

    Raises StoreError where there can be none for us: another user's folder, or no folder.
    """
    try:
        return (home / "VERSION").read_text("utf-8", "replace").strip()
    except (PermissionError, NotADirectoryError) as error:
        problem = f"cannot be read ({error.strerror}); use a CRUCIBLE_HOME that is a folder of this user"
        raise StoreError(str(home), problem, socket.gethostname()) from error
    except OSError:
        return None


def open_layout(home: Path) -> None:
    """Make sure that the store at `home`, if there is one, has our layout. Raises StoreVersion, or what the disk says.

    Of several processes that find an older one, one migrates and the others wait for it.
    """
    found = found_layout(home)
    if found is None or found == LAYOUT:
        return
    _way(home, found)
    lock = FileLock(home / "locks" / "layout.lock")
    with disk_errors(home / "VERSION"):
        (home / "locks").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_WAIT_S)
        except Timeout:
            raise StoreVersion(
                str(home), f"another process has been migrating it from layout {found} for {LOCK_WAIT_S:.0f} s"
            ) from None
        try:
            for layout, migrate in _way(home, found_layout(home) or LAYOUT):
                migrate(home)
                stamp(home, layout)
        finally:
            lock.release()


def stamp(home: Path, layout: str = LAYOUT) -> None:
    """Say in `VERSION` which layout the store has. Raises OSError."""
    path = home / "VERSION"
    temporary = path.with_name(f".VERSION.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(layout.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _way(home: Path, found: str) -> list[Migration]:
    """The migrations from `found` to our layout, in order. Raises StoreVersion where there is no way."""
    way: list[Migration] = []
    layout = found
    while layout != LAYOUT:
        if layout not in MIGRATIONS or len(way) > len(MIGRATIONS):
            said = found if found.isalnum() else repr(found[:20])
            raise StoreVersion(str(home), f"a store of layout {said}, this crucible reads {LAYOUT}")
        way.append(MIGRATIONS[layout])
        layout = way[-1][0]
    return way
