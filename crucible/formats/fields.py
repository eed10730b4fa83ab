"""The rows under one field of a JSON object, without the object: an item of the array is held, not the array."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any

from crucible.errors import CorruptFile
from crucible.formats.limits import Limits

_SPACE = re.compile(r"[ \t\r\n]*")
_READ = 1 << 20
_NUMBER = re.compile(r"[0-9.eE+-]*")


def goes_on(text: str, end: int) -> bool:
    """True where what comes behind the value that ends at `end` may be more of it: `0` of `0.5`, `1` of `12`."""
    return _NUMBER.match(text, end).end() == len(text)  # type: ignore[union-attr]  # it matches nothing too


def field_values(file: io.BufferedReader, name: str, field: str, limits: Limits) -> Iterator[Any]:
    """The items of the array at `field` of the one object in `file`; of an object of columns its rows, else the value.

    Raises CorruptFile for what is not one JSON object with that field, also where that shows behind the field. Whatever
    else the object has is held while it is passed over, one value at a time.
    """
    text = _Text(file, name, limits)
    found = False
    if text.char() != "{":
        raise CorruptFile(name, f"field {field!r}", "is not there: the file is not one JSON object")
    text.take()
    while text.char() != "}":
        key = text.value()
        if not isinstance(key, str) or text.char() != ":":
            raise text.problem("not JSON (an object's key is text, and a colon comes after it)")
        text.take()
        if key != field:
            text.value()
        elif found:
            raise CorruptFile(name, f"field {field!r}", "is there twice")
        else:
            found = True
            yield from text.items() if text.char() == "[" else _rows(text.value())
        text.comma("}")
    text.take()
    if text.char():
        raise text.problem("not one JSON value (something comes after its end)")
    if not found:
        raise CorruptFile(name, f"field {field!r}", "is not there")


def _rows(value: Any) -> Iterator[Any]:
    """The rows of an object of columns; any other value is one row."""
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        yield from (dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True))
    else:
        yield value


class _Text:
    """Text that is read on as its values are taken off its front."""

    def __init__(self, file: io.BufferedReader, name: str, limits: Limits) -> None:
        self._file, self._name, self._limits = file, name, limits
        self._decode, self._parse = codecs.getincrementaldecoder("utf-8")(), json.JSONDecoder()
        self._text, self._at, self._before, self._ended = "", 0, 0, False

    def problem(self, what: str) -> CorruptFile:
        return CorruptFile(self._name, f"after character {self._before + self._at:,}", what)

    def _more(self) -> bool:
        """Read on, twice as much as before while one value does not fit. False at the end of the file."""
        if self._ended:
            return False
        self._text, self._before, self._at = self._text[self._at :], self._before + self._at, 0
        self._limits.check_row(self._name, f"after character {self._before:,}", len(self._text))
        data = self._file.read(max(_READ, len(self._text)))
        self._ended = not data
        try:
            self._text += self._decode.decode(data, final=self._ended)
        except UnicodeError as error:
            raise self.problem(f"not UTF-8 ({error})") from error
        return True

    def char(self) -> str:
        """The next character that is no blank; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # matches nothing too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> None:
        """Pass the character that `char` gave."""
        self._at += 1

    def comma(self, end: str) -> None:
        """Pass the comma behind a value, with another value behind it; or stay before `end`."""
        if self.char() == ",":
            self.take()
            if self.char() != end:
                return
        elif self.char() == end:
            return
        raise self.problem(f"not JSON (neither a comma and a value nor {end!r} comes after a value)")

    def value(self) -> Any:
        self.char()
        while True:
            try:
                value, end = self._parse.raw_decode(self._text, self._at)
            except (JSONDecodeError, RecursionError) as error:
                if not self._more():
                    raise self.problem(f"not JSON ({error})") from error
                continue
            if goes_on(self._text, end) and self._more():
                continue
            self._at = end
            return value

    def items(self) -> Iterator[Any]:
        """The values of the array that comes next."""
        self.take()
        while self.char() != "]":
            yield self.value()
            self.comma("]")
        self.take()
