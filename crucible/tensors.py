"""Columns and values as numpy arrays, torch tensors or jax arrays, with the types that `datasets` gives. No I/O.

Numbers become int64 and float32 whatever their width in the file (jax: int32 while 64 bits are off), equally long lists
of them one block. Images keep their own type, channels last; for torch first. What no array can hold (text, structs,
lists of several lengths) comes as an object array of numpy's, and as a list for torch and jax.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from crucible.errors import UsageError


class Pixels:
    """An image on its way into an array: it keeps its type, where numbers are widened."""

    __slots__ = ("array",)

    def __init__(self, array: Any) -> None:
        self.array = array


class NumpyMaker:
    """Makes numpy's. Its children differ in what becomes of an array in the end."""

    def unpacked(self, value: Any) -> Any:
        """A decoded value with its images, at any depth, as `Pixels`. Worth a thread of its own: it copies them."""
        if isinstance(value, list):
            return [self.unpacked(one) for one in value]
        if isinstance(value, dict):
            return {name: self.unpacked(one) for name, one in value.items()}
        pil = sys.modules.get("PIL.Image")
        return Pixels(self._channels(np.asarray(value))) if pil is not None and isinstance(value, pil.Image) else value

    def column(self, column: pa.ChunkedArray) -> Any:
        """A column as a batch has it."""
        array = _whole(column)
        if _is_list(array.type):
            block = _block(array)
            if block is not None:
                return self._array(block)
        elif _is_plain(array.type) and not (pa.types.is_boolean(array.type) and array.null_count):
            return self._array(array.to_numpy(zero_copy_only=False))
        return self.values(_objects_of(array))

    def rows(self, column: pa.ChunkedArray) -> Sequence[Any]:
        """A column's values, as rows have them."""
        array = _whole(column)
        if not _is_list(array.type):
            return [self.value(one) for one in _plain_rows(array)]
        flat = array.flatten()
        block = None if flat.null_count else _block(array)
        return [self.value(one) for one in _list_rows(array, flat)] if block is None else [*map(self._array, block)]

    def values(self, values: Sequence[Any]) -> Any:
        """What is `unpacked`, as a column: one array if all of them are arrays of one shape and type."""
        if all(isinstance(value, Pixels) for value in values) and _alike([value.array for value in values]):
            return self._exact(np.stack([value.array for value in values]))
        made = [self.value(value) for value in values]
        whole = all(self._is_array(one) for one in made) and _alike(made)
        return self._stack(made) if whole else self._listed(made)

    def collated(self, values: Sequence[Any]) -> Any:
        """What the user's own functions made, as a column: like `values`, and numbers of Python's are widened too."""
        if values and all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values):
            return self._array(np.asarray(values))
        return self.values([self.unpacked(value) for value in values])

    def value(self, value: Any) -> Any:
        """One `unpacked` value."""
        if value is None or isinstance(value, (str, bytes)):
            return value
        if isinstance(value, Pixels):
            return self._exact(value.array)
        if isinstance(value, dict):
            return {name: self.value(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return self.values(value)
        if isinstance(value, np.ndarray):
            if value.dtype == object and value.ndim:
                return self.values(list(value))
            # arrays of bytes with several dimensions are somebody's image
            return self._exact(value) if value.dtype == np.uint8 and value.ndim > 1 else self._array(value)
        return self._scalar(value)

    # --- what the formats differ in ---

    def _array(self, array: Any) -> Any:
        return _widened(array)

    def _exact(self, array: Any) -> Any:
        return array

    def _channels(self, pixels: Any) -> Any:
        """(height, width) or (height, width, channels) as the format has it."""
        return pixels

    def _scalar(self, value: Any) -> Any:
        return value if isinstance(value, np.number) or not _is_number(value) else np.asarray(value)

    def _is_array(self, value: Any) -> bool:
        return isinstance(value, (np.ndarray, np.number, np.bool_))

    def _stack(self, arrays: list[Any]) -> Any:
        return np.stack(arrays)

    def _listed(self, values: list[Any]) -> Any:
        out = np.empty(len(values), dtype=object)
        for number, value in enumerate(values):
            out[number] = value
        return out


class TorchMaker(NumpyMaker):
    """Makes tensors, each of memory of its own: mapped columns are read-only, and torch warns about such."""

    @cached_property
    def _torch(self) -> Any:
        import torch  # pyright: ignore[reportMissingImports] - an extra

        return torch

    def _array(self, array: Any) -> Any:
        return self._torch.from_numpy(np.array(_widened(array))) if array.dtype.kind in "biuf" else _listed(array)

    def _exact(self, array: Any) -> Any:
        own = array.flags.writeable and array.flags.c_contiguous
        return self._torch.from_numpy(array if own else np.array(array, order="C"))

    def _channels(self, pixels: Any) -> Any:
        return np.array(np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None], order="C")

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, (np.number, np.bool_)):
            return self._torch.from_numpy(np.array(_widened(np.asarray(value))))
        return self._torch.tensor(value) if isinstance(value, (bool, int, float)) else _python(value)

    def _is_array(self, value: Any) -> bool:
        return isinstance(value, self._torch.Tensor)

    def _stack(self, arrays: list[Any]) -> Any:
        return self._torch.stack(arrays)

    def _listed(self, values: list[Any]) -> Any:
        return values


class JaxMaker(NumpyMaker):
    """Makes arrays on jax' default device."""

    @cached_property
    def _jax(self) -> Any:
        import jax  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports] - an extra

        return jax

    def _array(self, array: Any) -> Any:
        jnp, wide = self._jax.numpy, self._jax.config.jax_enable_x64
        if array.dtype.kind not in "biuf":
            return _listed(array)
        whole = jnp.int64 if wide else jnp.int32
        return jnp.array(array, dtype={"i": whole, "u": whole, "f": jnp.float32}.get(array.dtype.kind))

    def _exact(self, array: Any) -> Any:
        return self._jax.numpy.array(array)

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, (np.number, np.bool_)):
            return self._array(np.asarray(value))
        return self._jax.numpy.array(value) if isinstance(value, (bool, int, float)) else _python(value)

    def _is_array(self, value: Any) -> bool:
        return isinstance(value, self._jax.Array)

    def _stack(self, arrays: list[Any]) -> Any:
        return self._jax.numpy.stack(arrays)

    def _listed(self, values: list[Any]) -> Any:
        return values


MAKERS: dict[str, type[NumpyMaker]] = {"numpy": NumpyMaker, "torch": TorchMaker, "jax": JaxMaker}


def maker(format_: str) -> NumpyMaker:
    """What makes the values of a format. Raises UsageError if its library is not installed."""
    try:
        __import__(format_)
    except ImportError as error:
        raise UsageError(f"with_format({format_!r}) needs {format_}: pip install {format_} ({error})") from error
    return MAKERS[format_]()


# --- from Arrow ---

_PLAIN = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_boolean,
    pa.types.is_timestamp,
    pa.types.is_date,
    pa.types.is_duration,
)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunks at all, or more than fit one
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    while isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _block(array: pa.Array) -> Any:
    """Lists of numbers, at any depth, as one array; None when they are not equally long or there is a null list."""
    shape = [len(array)]
    while _is_list(array.type):
        lengths = _lengths(array)
        if not len(array) or array.null_count or lengths.min() != lengths.max():
            return None
        shape.append(int(lengths[0]))
        array = array.flatten()
    if not _is_plain(array.type) or (pa.types.is_boolean(array.type) and array.null_count):
        return None
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _list_rows(array: pa.Array, flat: pa.Array) -> Iterator[Any]:
    """Each list as an array, or as an array of arrays; None for a null."""
    if flat.null_count and pa.types.is_integer(flat.type):  # a null makes fractions of its own row only
        for row in range(len(array)):
            yield None if array[row].as_py() is None else _objects_of(array.slice(row, 1))[0]
    else:
        yield from _objects_of(array)


def _plain_rows(array: pa.Array) -> Iterator[Any]:
    if pa.types.is_integer(array.type) and array.null_count:
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        values = array.fill_null(0).to_numpy(zero_copy_only=False)
        yield from (value if there else np.float64("nan") for value, there in zip(values, valid))
    else:
        yield from _objects_of(array)


def _objects_of(array: pa.Array) -> list[Any]:
    """One value for each row, lists as arrays, in their own widths."""
    if pa.types.is_boolean(array.type) or not (_is_plain(array.type) or pa.types.is_nested(array.type)):
        values: list[Any] = array.to_pylist()
        return values
    return list(array.to_numpy(zero_copy_only=False))


def _lengths(array: pa.Array) -> Any:
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)


def _is_list(type_: pa.DataType) -> bool:
    return any(test(type_) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _is_plain(type_: pa.DataType) -> bool:
    """Whether an array of numpy's own types holds it."""
    return any(test(type_) for test in _PLAIN)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.generic))


def _alike(arrays: Sequence[Any]) -> bool:
    """Whether there is one shape and type for all of them."""
    return len({(tuple(one.shape), one.dtype) for one in arrays}) == 1


def _listed(array: Any) -> list[Any]:
    """Moments as Python has them, which knows no nanoseconds."""
    return list((array.astype(f"{array.dtype.kind}8[us]") if array.dtype.str.endswith("[ns]") else array).tolist())


def _python(value: Any) -> Any:
    return _listed(np.asarray([value]))[0] if isinstance(value, np.generic) else value


def _widened(array: Any) -> Any:
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array
