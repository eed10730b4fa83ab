"""Lists as they stand in the file, where pyarrow's JSON reader loses the null that the first of them begins with.

It reads `{"a": [null, 1]}` as a list of two over the single value 1 (pyarrow 26 does), at any depth. What is missing is
always at the front, so it can be put back; no value is read from where it is not.
"""

from __future__ import annotations

import pyarrow as pa


def whole_lists(table: pa.Table) -> pa.Table:
    """The table with as many values in each list column as its lists are long."""
    for place, field in enumerate(table.schema):
        if _has_lists(field.type):
            chunks = table.column(place).chunks
            whole = [_whole(chunk) for chunk in chunks]
            if any(made is not chunk for made, chunk in zip(whole, chunks, strict=True)):
                table = table.set_column(place, field, pa.chunked_array(whole, field.type))
    return table


def _has_lists(type_: pa.DataType) -> bool:
    return pa.types.is_list(type_) or (pa.types.is_struct(type_) and any(_has_lists(field.type) for field in type_))


def _whole(array: pa.Array) -> pa.Array:
    """`array` itself where nothing is missing. Its offset is 0: the reader makes no slices."""
    type_ = array.type
    if not _has_lists(type_):
        return array
    buffers = array.buffers()
    if pa.types.is_struct(type_):
        children = [array.field(number) for number in range(type_.num_fields)]
        whole = [_whole(child) for child in children]
        if all(made is child for made, child in zip(whole, children, strict=True)):
            return array
        return pa.Array.from_buffers(type_, len(array), buffers[:1], array.null_count, children=whole)
    values = array.values
    child = _whole(values)
    at = 4 * len(array)
    missing = int.from_bytes(buffers[1][at : at + 4].to_pybytes(), "little") - len(child)
    if missing > 0:
        child = pa.concat_arrays([pa.nulls(missing, child.type), child])
    if child is values:
        return array
    return pa.Array.from_buffers(type_, len(array), buffers[:2], array.null_count, children=[child])
