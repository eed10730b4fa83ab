"""The root of all errors. `crucible.errors` has the tree, and is where to import any of it from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from crucible.printable import printable


class CrucibleError(Exception):
    """Base of all errors of this package. What they say can be shown on a terminal, whatever a name in it contains."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        own = cls.__dict__.get("__str__")
        if own is not None:
            setattr(cls, "__str__", _shown(own))  # noqa: B010 - a method cannot be assigned to, as type checkers see it


def first_line(error: BaseException) -> str:
    """The first line of what an error says that has any text; its type's name if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _shown(text_of: Callable[[Any], str]) -> Callable[[Any], str]:
    @functools.wraps(text_of)
    def shown(error: Any) -> str:
        return printable(text_of(error))

    return shown
