"""Arrow IPC, the file format and the stream format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from crucible.errors import CorruptFile
from crucible.formats.parquet import BATCH_BYTES, first_line
from crucible.formats.plain import plain_pieces, plain_schema
from crucible.formats.streams import refuse_packed
from crucible.refs import ReadOptions


def read_arrow(path: Path, name: str, _options: ReadOptions) -> Iterator[pa.RecordBatch]:
    rows = 0
    try:
        with pa.OSFile(str(path), "rb") as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
            batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else iter(reader)
            for batch in batches:
                batch.validate(full=True)
                for piece in (part for whole in plain_pieces(batch, BATCH_BYTES) for part in _pieces(whole)):
                    rows += piece.num_rows
                    yield piece
            if not is_file:
                _check_end(path, name)
            if not rows:
                schema = plain_schema(reader.schema)
                yield pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        refuse_packed(path, name, "Arrow")
        raise CorruptFile(name, f"after row {rows:,}", f"not whole Arrow data ({first_line(error)})") from error


def _check_end(path: Path, name: str) -> None:
    """A stream ends with its end-of-stream mark; without it, the file was cut between two batches."""
    with path.open("rb") as file:
        file.seek(-min(8, path.stat().st_size), 2)
        if not file.read().endswith(b"\x00\x00\x00\x00"):
            raise CorruptFile(name, "its end", "the stream has no end mark, so it may be cut short")


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    count = max(1, -(-batch.nbytes // BATCH_BYTES))
    size = max(1, -(-batch.num_rows // count))
    for start in range(0, batch.num_rows, size):
        yield batch.slice(start, size)
