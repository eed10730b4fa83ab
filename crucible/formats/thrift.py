"""Thrift's compact protocol, as far as parquet's footers and page headers need it. Pure, over bytes in memory.

pyarrow ends the process where a damaged footer is asked for its column chunks; this raises. It is for bytes that no
hash has vouched for: every length is checked against what is there, and nothing is nested deeper than `MOST_DEEP`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_DEEP = 16
"""Structs and lists inside each other; parquet's own nest six deep."""

Spec = Mapping[int, Any]
"""Which fields of a struct to keep: field id -> None, or the spec of the struct, or of the list's structs, in it."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class BadThrift(ValueError):
    """These bytes are no such struct."""


class CutShort(BadThrift):
    """The struct goes on where the bytes end."""


def read_struct(data: bytes, spec: Spec, at: int = 0) -> tuple[dict[int, Any], int]:
    """(the fields that `spec` names, the offset behind the struct) of the struct at `at`.

    Integers and booleans come as they are, text as bytes, lists as lists. What is not named is skipped, but checked.
    Raises CutShort where the bytes end too early, else BadThrift.
    """
    reader = _Reader(data, at)
    try:
        found = reader.struct(spec, 0)
    except IndexError:
        raise CutShort("ends in the middle") from None
    return found, reader.at


class _Reader:
    __slots__ = ("at", "data")

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise BadThrift("a number of more than 64 bits")

    def number(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, spec: Spec, deep: int) -> dict[int, Any]:
        if deep > MOST_DEEP:
            raise BadThrift("nested too deep")
        found: dict[int, Any] = {}
        field = 0
        while head := self.data[self.at]:
            self.at += 1
            kind = head & 0x0F
            field = field + (head >> 4) if head >> 4 else self.number()
            if kind in (_TRUE, _FALSE):
                if field in spec:
                    found[field] = kind == _TRUE
            elif field in spec:
                found[field] = self.value(kind, spec[field], deep + 1)
            else:
                self.skip(kind, deep + 1)
        self.at += 1
        return found

    def value(self, kind: int, spec: Spec | None, deep: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self.number()
        if kind == _BINARY:
            size = self.size()
            self.at += size
            return self.data[self.at - size : self.at]
        if kind == _STRUCT:
            return self.struct(spec or {}, deep)
        if kind in (_LIST, _SET):
            of, count = self.head_of_list()
            return [self.value(of, spec, deep + 1) for _ in range(count)]
        before = self.at
        self.skip(kind, deep)
        return self.data[before : self.at]

    def skip(self, kind: int, deep: int) -> None:
        if deep > MOST_DEEP:
            raise BadThrift("nested too deep")
        if kind in (_I16, _I32, _I64):
            self.varint()
        elif kind == _BINARY:
            size = self.size()
            self.at += size
        elif kind in (_BYTE, _TRUE, _FALSE):  # a boolean in a list is a byte
            self._past(1)
        elif kind == _DOUBLE:
            self._past(8)
        elif kind == _STRUCT:
            self.struct({}, deep)
        elif kind in (_LIST, _SET):
            of, count = self.head_of_list()
            for _ in range(count):
                self.skip(of, deep + 1)
        elif kind == _MAP:
            if count := self.size():
                kinds = self.data[self.at]
                self.at += 1
                for _ in range(count):
                    self.skip(kinds >> 4, deep + 1)
                    self.skip(kinds & 0x0F, deep + 1)
        else:
            raise BadThrift(f"a field of the unknown type {kind}")

    def head_of_list(self) -> tuple[int, int]:
        """(type, how many). An element is a byte at least, so a count that the bytes cannot hold is refused at once."""
        head = self.data[self.at]
        self.at += 1
        count = head >> 4
        if count == 15:
            count = self.size()
        return head & 0x0F, count

    def size(self) -> int:
        size = self.varint()
        if size > len(self.data) - self.at:
            raise CutShort("ends in the middle")
        return size

    def _past(self, size: int) -> None:
        if size > len(self.data) - self.at:
            raise CutShort("ends in the middle")
        self.at += size
