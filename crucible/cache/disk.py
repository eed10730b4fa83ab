"""What every writer of this package needs of a disk: its complaints as our errors, and renames that last."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crucible.errors import DiskFull, StoreError, StoreReadOnly

LOCK_WAIT_S = 900.0
"""Longer than one work item takes on a slow link; a healthy holder is done by then."""


@contextmanager
def disk_errors(path: Path, need: str = "") -> Iterator[None]:
    """Translate what a disk says into DiskFull, StoreReadOnly or StoreError naming `path`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(str(path), need) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreReadOnly(str(path), os.strerror(error.errno)) from error
        raise StoreError(str(path), str(error)) from error


def fsync_folder(folder: Path) -> None:
    """Make a rename last over a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
