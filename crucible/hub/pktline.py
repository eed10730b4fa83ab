"""git's framing, for both of its ends: a packet is four hex digits of length, those four included, then the bytes.

Lengths below 4 are marks. A side-band packet begins with the number of its band. Pure: the bytes come from an iterator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

MOST = 65520
"""Bytes of the longest packet, its length included."""
PACK, PROGRESS, FATAL = 1, 2, 3
"""The bands."""


class Mark(Enum):
    FLUSH = b"0000"
    DELIMITER = b"0001"
    END = b"0002"


class FramingError(Exception):
    """These bytes are no packets, or end inside one."""


def packet(content: str | bytes) -> bytes:
    """One packet. A str is a line of text and gets its newline."""
    data = content.encode() + b"\n" if isinstance(content, str) else content
    if len(data) + 4 > MOST:
        raise ValueError(f"a packet holds at most {MOST - 4} bytes, not {len(data)}")
    return b"%04x%b" % (len(data) + 4, data)


def banded(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A stream as packets of the pack's band, each as full as it can be."""
    waiting = bytearray()
    room = MOST - 5
    for piece in pieces:
        waiting += piece
        while len(waiting) >= room:
            yield packet(bytes([PACK]) + waiting[:room])
            del waiting[:room]
    if waiting:
        yield packet(bytes([PACK]) + waiting)


class Packets:
    """The packets of a stream, one after another. Holds one packet and one piece of the stream."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = iter(pieces)
        self._held = bytearray()

    def __iter__(self) -> Iterator[bytes | Mark]:
        while True:
            found = self.next()
            if found is None:
                return
            yield found

    def next(self) -> bytes | Mark | None:
        """The next packet's content, or its mark; None at the end of the stream. Raises FramingError."""
        if not self._fill(4):
            if self._held:
                raise FramingError("the reply ends inside a packet")
            return None
        head = bytes(self._held[:4])
        try:
            length = int(head, 16)
        except ValueError:
            raise FramingError(f"{head!r} is no packet's length") from None
        if length < 4:
            del self._held[:4]
            try:
                return Mark(head)
            except ValueError:
                raise FramingError(f"{head!r} is no packet's length") from None
        if length > MOST:
            raise FramingError(f"a packet of {length} bytes")
        if not self._fill(length):
            raise FramingError("the reply ends inside a packet")
        content = bytes(self._held[4:length])
        del self._held[:length]
        return content

    def text(self) -> str | Mark | None:
        """The next packet as a line, its newline taken off."""
        found = self.next()
        return found.decode(errors="replace").removesuffix("\n") if isinstance(found, bytes) else found

    def _fill(self, count: int) -> bool:
        while len(self._held) < count:
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._held += piece
        return True
