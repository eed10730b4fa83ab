"""The one byte layout of given values, so that equal shards are equal files on every node. Pure.

Arrow leaves much open: what lies under a null, the unused bits of a bitmap, a bitmap that says nothing, an offset into
a bigger buffer. Here nulls lie over zeros, empty text and empty lists, bitmaps are there only when something is null,
and every buffer is exactly as long as its values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute  # its functions are made at run time, which no type checker follows


def canonical_batch(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same values and schema in the canonical layout."""
    return pa.RecordBatch.from_arrays([canonical(column) for column in batch.columns], schema=batch.schema)


def canonical(array: Any) -> Any:
    type_ = array.type
    if isinstance(array, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(type_, canonical(array.storage))
    if pa.types.is_null(type_):
        return pa.nulls(len(array))
    if pa.types.is_struct(type_):
        children = [canonical(child) for child in array.flatten()]
        return pa.Array.from_buffers(type_, len(array), [_validity(array)], array.null_count, children=children)
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_map(type_):
        return _list(array)
    if pa.types.is_fixed_size_list(type_):
        return _fixed_list(array)
    if pa.types.is_boolean(type_):
        bits = _bits(pc.fill_null(array, False))
        return pa.Array.from_buffers(type_, len(array), [_validity(array), bits], array.null_count)
    if _is_varied(type_):
        return _varied(array)
    if hasattr(type_, "byte_width") or pa.types.is_primitive(type_):
        return _fixed(array)
    return pa.concat_arrays([array])  # unions, views, dictionaries: no source gives them to a shard


def _validity(array: Any) -> Any:
    return _bits(array.is_valid()) if array.null_count else None


def _bits(booleans: Any) -> Any:
    return pa.py_buffer(np.packbits(booleans.to_numpy(zero_copy_only=False), bitorder="little").tobytes())


def _is_varied(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(type_)
        or pa.types.is_binary(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_large_binary(type_)
    )


def _wide(type_: pa.DataType) -> bool:
    return bool(pa.types.is_large_string(type_) or pa.types.is_large_binary(type_) or pa.types.is_large_list(type_))


def _varied(array: Any) -> Any:
    filled = pc.fill_null(array, b"" if "binary" in str(array.type) else "") if array.null_count else array
    _, offsets, data = filled.buffers()
    numbers = _offsets(filled, offsets)
    first, last = int(numbers[0]), int(numbers[-1])
    content = data.slice(first, last - first) if data is not None else pa.py_buffer(b"")
    rebased = pa.py_buffer((numbers - numbers[0]).tobytes())
    return pa.Array.from_buffers(array.type, len(array), [_validity(array), rebased, content], array.null_count)


def _offsets(array: Any, buffer: Any) -> Any:
    dtype = np.int64 if _wide(array.type) else np.int32
    if buffer is None or buffer.size == 0:
        return np.zeros(1, dtype)
    return np.frombuffer(buffer, dtype, count=len(array) + 1, offset=array.offset * np.dtype(dtype).itemsize)


def _fixed(array: Any) -> Any:
    type_ = array.type
    width = type_.bit_width // 8
    data = array.buffers()[1]
    if data is None:
        content = np.zeros((len(array), width), np.uint8)
    else:
        content = np.frombuffer(data, np.uint8, count=len(array) * width, offset=array.offset * width)
        content = content.reshape(len(array), width)
    if array.null_count:
        content = content.copy()
        content[array.is_null().to_numpy(zero_copy_only=False)] = 0
    buffer = pa.py_buffer(content.tobytes())
    return pa.Array.from_buffers(type_, len(array), [_validity(array), buffer], array.null_count)


def _list(array: Any) -> Any:
    wide = _wide(array.type)
    offsets = _offsets(array, array.buffers()[1])
    lengths = np.diff(offsets)
    whole = array.values if not pa.types.is_map(array.type) else _map_items(array)
    if array.null_count:
        missing = array.is_null().to_numpy(zero_copy_only=False)
        if lengths[missing].any():  # a null that hides items
            return _list(array.take(pa.array(np.arange(len(array)))))
    first, last = (int(offsets[0]), int(offsets[-1])) if len(array) else (0, 0)
    values = canonical(whole.slice(first, last - first))
    starts = np.zeros(len(array) + 1, np.int64 if wide else np.int32)
    np.cumsum(lengths, out=starts[1:])
    buffers = [_validity(array), pa.py_buffer(starts.tobytes())]
    return pa.Array.from_buffers(array.type, len(array), buffers, array.null_count, children=[values])


def _map_items(array: Any) -> Any:
    fields = [array.type.key_field, array.type.item_field]
    return pa.StructArray.from_arrays([array.keys, array.items], fields=fields)


def _fixed_list(array: Any) -> Any:
    size = array.type.list_size
    values = canonical(array.values.slice(array.offset * size, len(array) * size))
    if array.null_count and size:
        hidden = np.repeat(array.is_null().to_numpy(zero_copy_only=False), size)
        values = canonical(pc.if_else(pa.array(hidden), pa.scalar(None, values.type), values))
    return pa.Array.from_buffers(array.type, len(array), [_validity(array)], array.null_count, children=[values])
