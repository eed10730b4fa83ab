"""The regular files of a tar archive as a stream: ustar, GNU and pax, in the order in which they were written.

`tarfile` does the same at half the speed, takes a damaged header for the end of the archive, and reads an extended
header of any size into memory. Here every header is checked, and what is not one raises CorruptFile with its place.
An archive may end without its end mark, as `tarfile` allows too.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from crucible.errors import CorruptFile
from crucible.formats.limits import Limits

EXTENDED_BYTES = 1 << 20
"""Most that one extended header may have: long names and attributes."""

_BLOCK = 512
_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"
"""Links, devices and folders: their size, if they state one, is no data in the archive."""
_OCTAL = frozenset(b"01234567")


def tar_members(stream: io.BufferedReader, archive: str, limits: Limits) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every regular file. `archive` is its name in errors."""
    at = total = 0
    name: str | None = None
    attributes: dict[str, str] = {}
    every: dict[str, str] = {}
    while True:
        header = stream.read(_BLOCK)
        if not at and not header:
            raise CorruptFile(archive, "byte 0", "is empty, not a tar archive")
        if not header or header.count(0) == len(header) == _BLOCK:
            return
        size, kind = _checked(header, archive, at), header[156:157]
        at += _BLOCK
        if kind in (b"x", b"g", b"X", b"L", b"K"):
            if size > EXTENDED_BYTES:
                raise CorruptFile(
                    archive, f"byte {at:,}", f"a header of {size:,} bytes, at most {EXTENDED_BYTES:,} are allowed"
                )
            content = _data(stream, size, archive, at)
            at += -(-size // _BLOCK) * _BLOCK
            if kind == b"L":
                name = _text(content)
            elif kind == b"g":
                every |= _records(content, archive, at)
            elif kind != b"K":
                attributes = _records(content, archive, at)
            continue
        said = every | attributes
        if kind == b"S" or any(key.startswith("GNU.sparse.") for key in said):
            raise CorruptFile(archive, f"byte {at:,}", "a sparse file, which is not read")
        if "size" in said:
            size = int(said["size"]) if said["size"].isascii() and said["size"].isdigit() else -1
        name = said.get("path", name) or _name(header)
        regular = kind in _REGULAR and not (kind == b"\0" and name.endswith("/"))
        if size < 0:
            raise CorruptFile(archive, repr(name), "has no size")
        if regular:
            limits.check_row(archive, repr(name), size)
            total += size
            limits.check_unpacked(archive, total)
            yield name, _data(stream, size, archive, at)
        elif kind not in _WITHOUT_DATA and kind != b"\0":
            _skip(stream, size, archive, at)
        else:
            size = 0
        at += -(-size // _BLOCK) * _BLOCK
        name, attributes = None, {}


def _checked(header: bytes, archive: str, at: int) -> int:
    """The size that a header states. Raises CorruptFile for what is no header."""
    if len(header) < _BLOCK:
        raise CorruptFile(archive, f"byte {at:,}", "ends in the middle of a header")
    outside = header[:148] + header[156:]
    stated = _number(header[148:156])
    # some write the sum of signed bytes
    if stated != 256 + sum(outside) and stated != 256 + sum(byte - 256 if byte > 127 else byte for byte in outside):
        raise CorruptFile(archive, f"byte {at:,}", "no tar header (its checksum is wrong)")
    return _number(header[124:136])


def _number(field: bytes) -> int:
    """A number in octal digits, or in base 256; -1 for neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.partition(b"\0")[0].strip()
    if not _OCTAL.issuperset(digits):
        return -1
    return int(digits, 8) if digits else 0


def _name(header: bytes) -> str:
    prefix = header[345:500].partition(b"\0")[0]
    name = header[:100].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(content: bytes, archive: str, at: int) -> dict[str, str]:
    """The `<length> <key>=<value>` lines of a pax header."""
    found: dict[str, str] = {}
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if len(digits) < 10 and digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if length <= len(digits) + 1 or content[length - 1 : length] != b"\n" or not equals:
            raise CorruptFile(archive, f"byte {at:,}", "a pax header that cannot be read")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return found


def _data(stream: io.BufferedReader, size: int, archive: str, at: int) -> bytes:
    """The next `size` bytes; what fills up their last block is passed over."""
    padded = -(-size // _BLOCK) * _BLOCK
    content = stream.read(padded)
    if len(content) < padded:
        raise CorruptFile(archive, f"byte {at + len(content):,}", "ends in the middle of a file")
    return content[:size]


def _skip(stream: io.BufferedReader, size: int, archive: str, at: int) -> None:
    while size > 0:
        part = min(size, 1 << 20)
        _data(stream, part, archive, at)
        size, at = size - part, at + part
