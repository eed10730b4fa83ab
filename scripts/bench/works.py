"""What the benchmark moves: files of known hashes, in a repo of our Hub or as a shard in a node's store."""

from __future__ import annotations

import hashlib
import random
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from crucible.cache.store import Store
from crucible.hub.server import import_files

BLOCK = 1 << 20


@dataclass(frozen=True)
class Work:
    """Files to bring, and how to start the server that has them (`server` is a spec of `servers.py`)."""

    name: str
    kind: str
    """`big`, `small` or `peer`: which methods run."""
    server: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]
    """Name to (bytes, sha256)."""
    repo: str = ""
    lfs: bool = True

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.files.values())

    def check(self, found: Mapping[str, Path]) -> None:
        """Raise AssertionError unless `found` is exactly the work's files with the right bytes."""
        if set(found) != set(self.files):
            odd = sorted(set(found) ^ set(self.files))
            raise AssertionError(f"{self.name}: {len(odd)} files too many or missing, such as {odd[:3]}")

        def right(name: str) -> bool:
            with found[name].open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.files[name][1]

        with ThreadPoolExecutor(4) as pool:
            wrong = [name for name, ok in zip(found, pool.map(right, found)) if not ok]
        if wrong:
            raise AssertionError(f"{self.name}: wrong bytes in {len(wrong)} files, such as {wrong[:3]}")


def blocks(size: int, seed: int) -> Iterator[bytes]:
    """`size` bytes that do not compress, no two blocks the same, so that a range in the wrong place is noticed."""
    base = random.Random(seed).randbytes(BLOCK)
    for number, at in enumerate(range(0, size, BLOCK)):
        yield (number.to_bytes(8, "big") + base[8:])[: size - at]


def write(path: Path, size: int, seed: int) -> tuple[int, str]:
    """A file of `size` such bytes; (size, sha256)."""
    hasher = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks(size, seed):
            file.write(block)
            hasher.update(block)
    return size, hasher.hexdigest()


def big(name: str, folder: Path, sizes: list[int]) -> Work:
    """A few LFS files."""
    files: dict[str, tuple[int, str]] = {}
    paths: dict[str, bytes | Path] = {}
    for number, size in enumerate(sizes):
        path = folder / f"{name}-{number}.made"
        files[f"data/{number}.bin"] = write(path, size, number)
        paths[f"data/{number}.bin"] = path
    repo = f"bench/{name}"
    import_files(folder / "hub", repo, paths, lfs=True, durable=False)
    for made in folder.glob("*.made"):
        made.unlink()
    return Work(name, "big", {"kind": "hub", "root": str(folder / "hub")}, files, repo)


def small(name: str, folder: Path, count: int, size: int, *, lfs: bool) -> Work:
    """Many files of `size` bytes each, 500 to a folder."""
    rng = random.Random(count)
    contents: dict[str, bytes | Path] = {}
    files: dict[str, tuple[int, str]] = {}
    for number in range(count):
        path = f"part-{number // 500:03}/{number:06}.{'bin' if lfs else 'txt'}"
        text = number.to_bytes(8, "big").hex() + rng.randbytes(size).hex()  # no NUL: regular files are text
        contents[path] = data = text[:size].encode()
        files[path] = (len(data), hashlib.sha256(data).hexdigest())
    repo = f"bench/{name}"
    import_files(folder / "hub", repo, contents, lfs=lfs, durable=False)
    return Work(name, "small", {"kind": "hub", "root": str(folder / "hub")}, files, repo, lfs)


def peer(name: str, folder: Path, size: int) -> Work:
    """One shard in a node's store."""
    key = hashlib.sha256(name.encode()).hexdigest()
    store = Store(folder / "store")
    path = store.shard_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {key: write(path, size, 99)}
    spec = {"kind": "agent", "root": str(folder / "store"), "secret": secrets.token_urlsafe(32)}
    return Work(name, "peer", spec, files)


@dataclass(frozen=True)
class Sizes:
    """How much is moved; bytes."""

    one: int
    few: tuple[int, ...]
    regular: tuple[int, int]
    """(files, bytes of each)."""
    lfs: tuple[int, int]
    shard: int


MB = 10**6
QUICK = Sizes(256 * MB, (64 * MB,) * 4, (1000, 2048), (200, 20_000), 256 * MB)
FULL = Sizes(989 * MB, (256 * MB,) * 4, (10_000, 2048), (2000, 20_000), 512 * MB)


def makers(sizes: Sizes) -> dict[str, Callable[[Path], Work]]:
    """Name of a work to the function that makes it below a folder."""
    return {
        "one-big": lambda folder: big("one-big", folder, [sizes.one]),
        "few-big": lambda folder: big("few-big", folder, list(sizes.few)),
        "many-small": lambda folder: small("many-small", folder, *sizes.regular, lfs=False),
        "many-lfs": lambda folder: small("many-lfs", folder, *sizes.lfs, lfs=True),
        "peer": lambda folder: peer("peer", folder, sizes.shard),
    }
