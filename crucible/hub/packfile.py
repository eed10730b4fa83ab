"""Take wanted files out of a git packfile that somebody else made, in bounded memory and bounded work.

A file is handed on only when its bytes hash to an oid that was wanted, so a pack can lie about everything but that.
What it can do is cost: so the declared sizes of objects, their number, and all bytes that are inflated or made by
deltas are bounded before they are spent, whatever the pack says. Nothing is written; a crash leaves nothing.

`dulwich` reads packs too (tried, 1.2): it inflates every object whole in memory at whatever size the pack declares, and
it has no bound to set, which is all that this module is about.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from crucible.refs import SourceFile

COMMIT, TREE, BLOB, TAG, OFS_DELTA, REF_DELTA = 1, 2, 3, 4, 6, 7
PIECE = 64 << 10
"""Bytes of the pack that are read, or inflated, at once."""
OBJECT_MOST = 16 << 20
"""Bytes of the largest object that is held whole. A Hub keeps files above 10 MB in LFS; a larger one is left out."""
CACHE_MOST = 48 << 20
"""Bytes of delta bases held. A base that was dropped is made again from its own base."""
TRAILER = 20
WHOLE, UNKNOWN = -1, -2
"""In the place of a base: the object is stored whole; its base is named by an oid that no object has yet."""

Sink = Callable[[SourceFile, bytes | memoryview], None]


class PackError(Exception):
    """This is not a pack as git makes them, or one that costs more than it may."""


class CutShort(PackError):
    """The pack ends before its end."""


@dataclass(frozen=True, slots=True)
class PackLimits:
    """What a pack may cost."""

    size: int
    """Bytes of the pack."""
    objects: int
    work: int
    """Bytes inflated and bytes made by deltas, together."""


def unpack(
    stream: IO[bytes], missing: dict[str, SourceFile], sink: Sink, limits: PackLimits, *, cut: bool = False
) -> None:
    """Give `sink` each blob of the pack that is in `missing` (by oid), and take it out of there.

    The order is the pack's own. `cut` says that the end of the pack is known to be missing: what came of it is used
    then, and its checksum is not asked for. What the sink was given before a PackError is good. What the sink raises
    passes through.
    """
    pack = _Pack(stream, missing, sink, limits)
    if not cut:
        pack.check_trailer()
    try:
        pack.read_through(cut=cut)
    except CutShort:
        if not cut:
            raise
    pack.make_deltas()


class _Pack:
    def __init__(self, stream: IO[bytes], missing: dict[str, SourceFile], sink: Sink, limits: PackLimits) -> None:
        self._descriptor = stream.fileno()
        self._size = os.fstat(self._descriptor).st_size
        self._missing, self._sink, self._limits = missing, sink, limits
        self._sizes = {file.size for file in missing.values()}
        self._work = 0
        self._window, self._window_at = memoryview(b""), 0
        # One row an object, about 41 bytes: a pack of a million objects must not become a million Python objects.
        self._starts, self._bodies = array("Q"), array("Q")
        self._lengths = array("Q")  # of what is inflated there: the object, or the delta
        self._results = array("Q")  # of the object
        self._bases = array("q")  # row of the base, WHOLE or UNKNOWN
        self._useful = bytearray()  # 0: no blob, whatever its deltas are made of
        self._waiting: dict[bytes, list[int]] = {}  # oid -> rows of the deltas on it, until that object is found
        self._cache: OrderedDict[int, bytes | bytearray] = OrderedDict()
        self._cached = 0

    def check_trailer(self) -> None:
        if self._size < 12 + TRAILER:
            raise CutShort("the pack is shorter than its head")
        digest, at, end = hashlib.sha1(usedforsecurity=False), 0, self._size - TRAILER
        while at < end:
            piece = self._bytes(at, min(PIECE, end - at))
            digest.update(piece)
            at += len(piece)
        if digest.digest() != self._bytes(end, TRAILER):
            raise PackError("the pack's bytes do not give its checksum")

    def read_through(self, *, cut: bool) -> None:
        """One pass: hand on the blobs that are stored whole, note where everything lies."""
        head = self._bytes(0, 12)
        if len(head) < 12:
            raise CutShort("the pack is shorter than its head")
        magic, version, count = struct.unpack(">4sII", head)
        if magic != b"PACK" or version not in (2, 3):
            raise PackError("this is no pack")
        if count > self._limits.objects:
            raise PackError(f"{count:,} objects where at most {self._limits.objects:,} can belong to this commit")
        at = 12
        for _ in range(count):
            at = self._object_at(at)
        if not cut and at != self._size - TRAILER:
            raise PackError("the pack does not end after its last object")

    def make_deltas(self) -> None:
        """Make the blobs that are stored as changes of others, bases before what is made of them."""
        self._find_named_bases()
        children = self._families()
        stack = [row for row in children if self._bases[row] == WHOLE and self._lengths[row] <= OBJECT_MOST]
        while stack and self._missing:
            row = stack.pop()
            if self._bases[row] != WHOLE:
                content = self._content(row)
                if len(content) in self._sizes or self._waiting:
                    oid = self._hash(content)
                    self._offer(oid, content)
                    for child in self._waiting.pop(bytes.fromhex(oid), ()):
                        self._bases[child] = row
                        children.setdefault(row, []).append(child)
            stack.extend(children.pop(row, ()))

    def _object_at(self, start: int) -> int:
        """Note the object that begins at `start`, hand it on if it can be; where the next one begins."""
        kind, length, at = self._head(start)
        row, base, result = len(self._starts), WHOLE, length
        useful = kind == BLOB
        if kind == OFS_DELTA:
            distance, at = self._distance(at)
            base = bisect_left(self._starts, start - distance)
            if distance <= 0 or base == row or self._starts[base] != start - distance:
                raise PackError("a delta's base is no object of this pack")
            useful = bool(self._useful[base])
        elif kind == REF_DELTA:
            named = bytes(self._bytes(at, 20))
            if len(named) < 20:
                raise CutShort("the pack ends inside an object")
            at, base, useful = at + 20, UNKNOWN, True
        elif kind not in (COMMIT, TREE, BLOB, TAG):
            raise PackError(f"an object of the unknown kind {kind}")
        kept, body = bytearray(), at
        wanted = kind == BLOB and length in self._sizes and length <= OBJECT_MOST
        for piece, at in self._inflated(body, length):  # noqa: B007 - the last one counts
            if wanted or (base != WHOLE and len(kept) < 20):
                kept += piece
        if wanted:
            self._offer(self._hash(kept), kept)
        if base != WHOLE:
            _, result, _ = _delta_sizes(kept)
            useful = useful and max(length, result) <= OBJECT_MOST
        for column, value in (
            (self._starts, start), (self._bodies, body), (self._lengths, length),
            (self._results, result), (self._bases, base),
        ):  # fmt: skip
            column.append(value)
        self._useful.append(useful)
        if base == UNKNOWN and useful:
            self._waiting.setdefault(named, []).append(row)
        return at

    def _find_named_bases(self) -> None:
        """Which whole blobs are the bases that deltas name by oid. Costs a second pass, only where there are such."""
        if not self._waiting:
            return
        for row in range(len(self._starts)):
            if self._bases[row] == WHOLE and self._useful[row] and self._lengths[row] <= OBJECT_MOST:
                digest = hashlib.sha1(b"blob %d\0" % self._lengths[row], usedforsecurity=False)
                for piece, _ in self._inflated(self._bodies[row], self._lengths[row]):
                    digest.update(piece)
                for child in self._waiting.pop(digest.digest(), ()):
                    self._bases[child] = row

    def _families(self) -> dict[int, list[int]]:
        """Base to the deltas on it, of those that lead to a size that is wanted; all, while a base is only named."""
        children: dict[int, list[int]] = {}
        named = any(base > row for row, base in enumerate(self._bases)) or bool(self._waiting)
        leads = bytearray(len(self._starts))
        for row in range(len(self._starts) - 1, -1, -1):  # a base lies before its deltas, unless it is named
            base = self._bases[row]
            if base >= 0 and self._useful[row] and (named or leads[row] or self._results[row] in self._sizes):
                leads[base] = 1
                children.setdefault(base, []).append(row)
        return children

    def _content(self, row: int) -> bytes | bytearray:
        """An object whole. Its bases come from the cache, or are made again."""
        chain = []
        while row not in self._cache and self._bases[row] != WHOLE:
            chain.append(row)
            row = self._bases[row]
        content = self._cached_content(row)
        for row in reversed(chain):
            delta = self._inflate(row)
            base_size, size, at = _delta_sizes(delta)
            if base_size != len(content):
                raise PackError("a delta is for a base of another size")
            self._spend(size)
            content = apply_delta(content, delta, at, size)
            self._keep(row, content)
        return content

    def _cached_content(self, row: int) -> bytes | bytearray:
        if row in self._cache:
            self._cache.move_to_end(row)
            return self._cache[row]
        content = self._inflate(row)
        self._keep(row, content)
        return content

    def _keep(self, row: int, content: bytes | bytearray) -> None:
        self._cache[row] = content
        self._cached += len(content)
        while self._cached > CACHE_MOST:
            self._cached -= len(self._cache.popitem(last=False)[1])

    def _inflate(self, row: int) -> bytes:
        return b"".join(piece for piece, _ in self._inflated(self._bodies[row], self._lengths[row]))

    def _inflated(self, at: int, length: int) -> Iterator[tuple[bytes, int]]:
        """The bytes that are deflated at `at`, in pieces, each with where the pack goes on after what was read."""
        inflater = zlib.decompressobj()
        total, tail = 0, b""
        while not inflater.eof:
            data: bytes | memoryview = tail
            if not tail:
                # as much as deflate can need for it, so that little of the next object is taken and given back
                data = self._bytes(at, min(PIECE, length + (length >> 9) + 64))
                if not data:
                    raise CutShort("the pack ends inside an object")
                at += len(data)
            try:
                piece = inflater.decompress(data, PIECE)
            except zlib.error as error:
                raise PackError(f"an object cannot be inflated ({error})") from None
            tail = inflater.unconsumed_tail
            total += len(piece)
            if total > length:
                raise PackError("an object is longer than it says")
            self._spend(len(piece))
            yield piece, at - len(inflater.unused_data)
        if total != length:
            raise PackError("an object is shorter than it says")

    def _spend(self, count: int) -> None:
        self._work += count
        if self._work > self._limits.work:
            raise PackError(f"more than {self._limits.work:,} bytes come out of the pack, which cannot be this commit")

    def _offer(self, oid: str, content: bytes | bytearray) -> None:
        file = self._missing.get(oid)
        if file is not None and file.size == len(content):
            self._sink(file, memoryview(content).toreadonly())
            del self._missing[oid]

    @staticmethod
    def _hash(content: bytes | bytearray) -> str:
        digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
        digest.update(content)
        return digest.hexdigest()

    def _bytes(self, at: int, count: int) -> memoryview:
        """Up to `count` (at most PIECE) bytes of the pack, fewer only at its end."""
        start = at - self._window_at
        if start < 0 or start + count > len(self._window):
            self._window, self._window_at, start = memoryview(os.pread(self._descriptor, PIECE, at)), at, 0
        return self._window[start : start + count]

    def _head(self, at: int) -> tuple[int, int, int]:
        """(kind, length when inflated, where its body or its base begins)."""
        head = self._bytes(at, 16)
        if not head:
            raise CutShort("the pack ends before its last object")
        kind, length, shift, used = head[0] >> 4 & 7, head[0] & 15, 4, 1
        while head[used - 1] & 0x80:
            if used == 10:
                raise PackError("an object of absurd size")
            if used == len(head):
                raise CutShort("the pack ends inside an object")
            length |= (head[used] & 0x7F) << shift
            shift, used = shift + 7, used + 1
        return kind, length, at + used

    def _distance(self, at: int) -> tuple[int, int]:
        """How far before its delta a base begins. Each further byte counts from where fewer bytes end."""
        head = self._bytes(at, 16)
        distance, used = -1, 0
        while not used or head[used - 1] & 0x80:
            if used == 9:
                raise PackError("a delta's base is absurdly far away")
            if used == len(head):
                raise CutShort("the pack ends inside an object")
            distance = (distance + 1) << 7 | head[used] & 0x7F
            used += 1
        return distance, at + used


def _delta_sizes(delta: bytes | bytearray) -> tuple[int, int, int]:
    """(size of the base, size of the result, where the instructions begin)."""
    sizes, at = [0, 0], 0
    for which in (0, 1):
        shift = 0
        while True:
            if at == len(delta) or shift > 56:
                raise PackError("a delta without sizes")
            byte = delta[at]
            sizes[which] |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not byte & 0x80:
                break
    return sizes[0], sizes[1], at


def apply_delta(base: bytes | bytearray, delta: bytes, at: int, size: int) -> bytearray:
    """What a delta's instructions from `at` on make of `base`: exactly `size` bytes. Raises PackError."""
    made, put, source, end = bytearray(size), 0, memoryview(base), len(delta)
    while at < end:
        code = delta[at]
        at += 1
        if code & 0x80:  # copy: bits 0-3 say which bytes of the offset follow, bits 4-6 which of the length
            fields = 0
            for bit in range(7):
                if code >> bit & 1:
                    if at == end:
                        raise PackError("a delta ends inside an instruction")
                    fields |= delta[at] << (8 * bit)
                    at += 1
            offset, count = fields & 0xFFFFFFFF, fields >> 32 or 0x10000
            piece: bytes | memoryview = source[offset : offset + count]
        else:
            count = code
            piece = delta[at : at + count]
            at += count
        if not count or len(piece) != count or put + count > size:
            raise PackError("a delta copies what is not there")
        made[put : put + count] = piece
        put += count
    if put != size:
        raise PackError("a delta makes fewer bytes than it says")
    return made
