"""Tar headers as a bundle has them: one kind of member, plain file, one spelling of each header. Pure.

What a bundle holds follows from its lock file, so a reader does not interpret headers: it knows each one beforehand and
compares bytes. Links, devices, absolute paths and the rest of what tar can say are thereby nothing that is ever read.
"""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)
NAME_BYTES = 100
_OCTAL = 8 * 1024**3
"""From this size on it takes more than eleven octal digits; such a size is written in base 256, as GNU tar does."""


def header(name: str, size: int) -> bytes:
    """The block before a file's bytes: mode 0644, owner 0, time 0, so that the same files give the same tar."""
    path = name.encode("ascii")
    if len(path) >= NAME_BYTES or size < 0:
        raise ValueError(f"{name!r} of {size} bytes cannot be a member")
    length = b"%011o\0" % size if size < _OCTAL else b"\x80" + size.to_bytes(11, "big")
    fields = (
        path.ljust(NAME_BYTES, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        length,
        b"%011o\0" % 0,
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\0",
        b"00",
        bytes(32),
        bytes(32),
        b"0000000\0",
        b"0000000\0",
        bytes(155),
        bytes(12),
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> int:
    """Zero bytes after a file of `size` bytes, to the end of its last block."""
    return -size % BLOCK


def size_in(block: bytes, name: str) -> int | None:
    """The size that a header of `name` gives; None if the block is not exactly such a header."""
    field = block[124:136]
    try:
        size = int.from_bytes(field[1:], "big") if field[:1] == b"\x80" else int(field[:11], 8)
        return size if header(name, size) == block else None
    except ValueError:
        return None


def name_in(block: bytes) -> str:
    """What a header that was not expected seems to name, for an error message."""
    return block[:NAME_BYTES].split(b"\0")[0].decode("utf-8", "replace") if len(block) == BLOCK else ""
