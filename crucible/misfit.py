"""Say which value of a column does not fit, and why. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

MISFITS = (ValueError, TypeError, NotImplementedError, pa.ArrowException)
"""What a cast raises for values that do not fit."""


def misfit(column: pa.Array, cast: Callable[[pa.Array], Any], error: Exception) -> str:
    """The column's type, what is wrong, and the first value that does not fit if it is a matter of values."""
    try:
        cast(column.slice(0, 0))
    except MISFITS:
        return f"{short(column.type)} ({_reason(error)})"
    low, high = 0, len(column)  # the first `low` rows fit, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            cast(column.slice(low, middle - low))
            low = middle
        except MISFITS:
            high = middle
    try:
        cast(column.slice(low, 1))
    except MISFITS as alone:
        error = alone
    value = repr(column[low].as_py())
    shown = value if len(value) <= 80 else f"{value[:79]}…"
    return f"{short(column.type)} (row {low:,} of the batch, {shown}: {_reason(error)})"


def short(type_: pa.DataType) -> str:
    text = str(type_)
    return text if len(text) <= 200 else text[:200] + "…"


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
