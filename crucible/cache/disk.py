"""What every writer of this package needs of a disk: its complaints as our errors, writes and renames that last."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from crucible.errors import DiskFull, StoreError, StoreReadOnly

LOCK_WAIT_S = 900.0
"""Longer than one work item takes on a slow link; a healthy holder is done by then."""
_HEX = frozenset("0123456789abcdef")


@contextmanager
def disk_errors(path: Path, need: str = "") -> Iterator[None]:
    """Translate what a disk says into DiskFull, StoreReadOnly or StoreError naming `path`, this host and the `need`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        host = socket.gethostname()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(str(path), need, host) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreReadOnly(str(path), os.strerror(error.errno), host) from error
        raise StoreError(str(path), str(error), host) from error


def fsync_folder(folder: Path) -> None:
    """Make a rename last over a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_written(path: Path) -> None:
    """Raise OSError if the disk refused some of what was written to this file, and nobody has been told yet.

    For a file that nobody syncs, because it is needed only as long as this machine runs: what the disk has not been
    given by now stays where it is. Waits for what is on its way there.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _SYNC_FILE_RANGE is None:
            os.fsync(descriptor)
        elif _SYNC_FILE_RANGE(descriptor, 0, 0, _WAIT_BEFORE):
            number = ctypes.get_errno()
            if number not in (errno.ESPIPE, errno.ENOSYS):
                raise OSError(number, os.strerror(number), str(path))
            os.fsync(descriptor)  # a file system or a sandbox that has no such call
    finally:
        os.close(descriptor)


def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The call of Linux (sync_file_range(2)), which Python has no name for; None where there is none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return cast(Callable[[int, int, int, int], int], call)


_SYNC_FILE_RANGE = _sync_file_range()
_WAIT_BEFORE = 1


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Give `path` this content by a rename. Raises OSError, and leaves then what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_key(text: str) -> bool:
    """True for what may name a shard, an item or a manifest: 64 lower-case hex digits. Nothing else reaches a path."""
    return len(text) == 64 and _HEX.issuperset(text)


def key_files(root: Path, kind: str) -> Iterator[os.DirEntry[str]]:
    """Files named <key>.<kind> in the two-letter folders under `root`, in no order."""
    with suppress(FileNotFoundError), os.scandir(root) as folders:
        for folder in folders:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                for entry in entries:
                    key, dot, suffix = entry.name.partition(".")
                    if dot and suffix == kind and is_key(key):
                        yield entry


def disk_of(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that there is."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def new_workspace(root: Path) -> tuple[Path, int]:
    """A fresh folder under `root` for this process, and a descriptor that keeps it locked for as long as it is open."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{socket.gethostname()}-{os.getpid()}-", dir=root))
        with suppress(FileNotFoundError):  # else swept before it was locked
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if _lock(descriptor) and folder.exists():
                return folder, descriptor
            os.close(descriptor)


def dead_workspaces(root: Path) -> Iterator[Path]:
    """Folders under `root` of this host's dead processes; each stays locked until the next one is asked for.

    Another host's (a shared disk) are nobody's to judge. A process of a container beside this one cannot be seen from
    here, but it has its folder locked.
    """
    host = socket.gethostname()
    with suppress(FileNotFoundError):
        for folder in root.iterdir():
            name, _, rest = folder.name.rpartition("-")
            owner, _, pid = name.rpartition("-")
            if not rest or owner != host or not pid.isdigit() or _alive(int(pid)):
                continue
            with suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    if _lock(descriptor):
                        yield folder
                finally:
                    os.close(descriptor)


def sweep_workspaces(root: Path) -> None:
    """Remove the folders of this host's dead processes."""
    for folder in dead_workspaces(root):
        shutil.rmtree(folder, ignore_errors=True)


def _lock(descriptor: int) -> bool:
    """False if somebody else has it locked. A disk without locks locks out nobody."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
