"""How much one source file may unpack to. Nothing here changes the rows, so nothing here is part of a shard's key."""

from __future__ import annotations

from dataclasses import dataclass

from crucible.errors import CorruptFile

MOST_BYTES = (1 << 31) - 1
"""Bytes that one value of a shard can have: Arrow's offsets are 32 bits."""

MOST_GROWTH = 1000
"""Bytes of rows for a byte of a file, beyond what an archive may unpack to anyway. Text gives 20, sparse tables 100; a
column that repeats one long value has no bound in parquet, and a page of zeros gives 10,000 in zstd."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what archives and media files become in memory and on disk."""

    row_bytes: int = 1 << 30
    """Bytes of one file that becomes a value, of all the files of one row, and of a line of JSON or text, a field of
    CSV or an item of a JSON array. Such a row is held in memory, a long text up to ten times over when parsed."""
    unpacked_bytes: int = 64 << 30
    """What the files inside one archive may come to, and the rows of any file (`MOST_GROWTH`). Real ones stay far
    below, bombs do not."""

    def __post_init__(self) -> None:
        if self.row_bytes < 1 or self.unpacked_bytes < 1:
            raise ValueError(f"limits are at least one byte, got {self}")

    def check_row(self, name: str, where: str, size: int) -> None:
        """Raise CorruptFile if a row has more than `row_bytes`, or more than Arrow can hold."""
        if size > min(self.row_bytes, MOST_BYTES):
            advice = "set CRUCIBLE_ROW_BYTES higher" if size <= MOST_BYTES else "no Arrow value can be that big"
            raise CorruptFile(
                name,
                where,
                f"{size:,} bytes in one row, at most {min(self.row_bytes, MOST_BYTES):,} are allowed; {advice}",
            )

    def check_made(self, name: str, size: int, source: int) -> None:
        """Raise CorruptFile if `source` bytes of files have become rows of more than any data would."""
        most = max(self.unpacked_bytes, MOST_GROWTH * source)
        if size > most:
            raise CorruptFile(
                name,
                "",
                f"{source:,} bytes become rows of more than {most:,}; "
                "if that is right, set CRUCIBLE_UNPACKED_BYTES higher",
            )

    def check_unpacked(self, name: str, size: int) -> None:
        """Raise CorruptFile if an archive unpacks to more than `unpacked_bytes`."""
        if size > self.unpacked_bytes:
            raise CorruptFile(
                name,
                "",
                f"unpacks to {size:,} bytes or more, at most {self.unpacked_bytes:,} are allowed; "
                "if that is right, set CRUCIBLE_UNPACKED_BYTES higher",
            )
