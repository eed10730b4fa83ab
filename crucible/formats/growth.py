"""How many bytes of shards a source file becomes: an estimate, for a plan and for the room that an item asks for.

By what it is and what it is packed with. Measured on public sets (text, chat, code, images): plain text and JSON give
0.8 to 1.1 bytes a byte, CSV 0.9 to 1.6, media and tars 1.0, parquet 1.0 (images) to 8 (repetitive text).
"""

from __future__ import annotations

import posixpath

from crucible.refs import WorkItem

PACKED = {".gz": 5.0, ".bz2": 6.0, ".xz": 7.0, ".zst": 5.0, ".zip": 4.0, ".lz4": 3.0, ".7z": 7.0}
BUILT = {"parquet": 3.0, "csv": 1.6, "json": 1.2, "text": 1.3}
DEFAULT = 1.1


def growth(builder: str, path: str) -> float:
    """Bytes of shards for each byte of a source file."""
    packed = PACKED.get(posixpath.splitext(path)[1].lower(), 1.0)
    if path.lower().endswith((".tgz", ".tar.gz")):
        packed = PACKED[".gz"]
    return BUILT.get(builder, DEFAULT) * packed


def made_bytes(item: WorkItem) -> int:
    """Bytes of shards that an item is expected to become. Of a few columns of a table, all are counted."""
    return int(sum(file.size * growth(item.options.builder, file.path) for file in item.files))


def unpacked_bytes(item: WorkItem) -> int:
    """Bytes that lie unpacked beside an item's files while it is converted: of a zip archive, one file at a time."""
    zips = (file for file in item.files if file.path.lower().endswith(".zip"))
    return max((int(file.size * PACKED[".zip"]) for file in zips), default=0)


def peak_bytes(item: WorkItem) -> int:
    """Bytes on disk when an item is nearly done: its source files, what of them is unpacked, and its shards."""
    return item.size + unpacked_bytes(item) + made_bytes(item)
