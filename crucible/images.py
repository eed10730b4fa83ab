"""Image bytes to PIL images and back, and nothing else Pillow could be made to do with bytes from a repo."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crucible.errors import CorruptFile

if TYPE_CHECKING:
    from PIL.Image import Image

Claim = Callable[[int], None]
"""Told the bytes that something is about to unpack to; returns when there is room for them, or raises."""


def unbounded(_size: int) -> None:
    """The claim of one who decodes for himself, and holds what he asked for."""


_PROGRAMS = ("EPS", "IPTC")
"""Never opened: EPS is a program, which Pillow hands to Ghostscript, and IPTC wraps an image of any format, EPS too."""

_PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA")
"""What PNG holds; other modes are written as TIFF."""

_BYTE_MODES = ("1", "L", "P")
"""One byte a pixel; Pillow keeps the others in four, RGB too."""


def decode_image(
    value: Any, *, mode: str | None = None, column: str = "image", claim: Claim = unbounded
) -> Image | None:
    """The image in `{"bytes": …, "path": …}`, loaded and upright, in `mode` if one is given.

    Between reading its header and unpacking it, `claim` is told how big it will be.

    A null stays None. Raises CorruptFile for bytes that are no image, that are cut short, or that would unpack to more
    pixels than Pillow takes for an attack (a decompression bomb).
    """
    if value is None or not isinstance(value, dict):
        return value  # an image already, as `datasets` has it
    import PIL.ExifTags
    import PIL.Image
    import PIL.ImageOps

    where = f"column {column!r}"
    name = value.get("path") or "an image"
    content = value.get("bytes")
    if content is None:
        # a path in a row comes from the repo: opening it would read whatever file of this machine it names
        raise CorruptFile(name, where, "the row has a path but not the bytes of its image")
    try:
        image = _opened(content)
        _refuse_bomb(image)
        pixels = image.size[0] * image.size[1]
    except Exception as error:  # Pillow's readers raise whatever their parsers run into
        raise _unreadable(name, where, error) from error
    claim(pixels * (1 if image.mode in _BYTE_MODES else 4))
    try:
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            image = PIL.ImageOps.exif_transpose(image)
        return image.convert(mode) if mode and mode != image.mode else image
    except Exception as error:
        raise _unreadable(name, where, error) from error


def _unreadable(name: str, where: str, error: Exception) -> CorruptFile:
    import PIL.Image

    bombs = (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError, _Bomb)
    problem = f"refused: {error}" if isinstance(error, bombs) else f"not an image Pillow can read ({error!r})"
    return CorruptFile(name, where, problem)


def _opened(content: bytes) -> Image:
    """The image with its header read, in the first format that knows it.

    Pillow's five usual formats are tried alone until an image is of none of them: to load the others takes 80 ms, which
    a process with JPEGs need not wait. They are the first in Pillow's order, so each image is opened by the same one.
    """
    import PIL.Image

    PIL.Image.preinit()
    if not _formats.cache_info().currsize:
        usual = [name for name in PIL.Image.ID if name not in _PROGRAMS]
        try:
            return PIL.Image.open(io.BytesIO(content), formats=usual)
        except PIL.UnidentifiedImageError:
            pass
    return PIL.Image.open(io.BytesIO(content), formats=_formats())


@cache
def _formats() -> tuple[str, ...]:
    """The formats that are opened, in Pillow's order."""
    import PIL.Image

    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name not in _PROGRAMS)


class _Bomb(Exception):
    pass


def _refuse_bomb(image: Image) -> None:
    """Pillow only warns up to twice its limit, and a warning nobody turns into an error stops nothing."""
    import PIL.Image

    limit, pixels = PIL.Image.MAX_IMAGE_PIXELS, image.size[0] * image.size[1]
    if limit is not None and pixels > limit:
        raise _Bomb(
            f"{pixels:,} pixels, more than {limit:,} (PIL.Image.MAX_IMAGE_PIXELS): it could be a decompression bomb"
        )


def encode_image(value: Any) -> dict[str, Any]:
    """`{"bytes", "path"}` of an image given as bytes, a path, an array, a PIL image, or that very dict.

    A PIL image is written in the format it was read from, else as PNG, else as TIFF. Raises ValueError or TypeError.
    """
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path") is None:
            raise ValueError("an image needs bytes or a path")
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value), "path": None}
    if isinstance(value, Path):
        return {"bytes": None, "path": str(value.absolute())}
    if isinstance(value, (str, PathLike)):
        return {"bytes": None, "path": fspath(value)}
    import PIL.Image

    if isinstance(value, list):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        return {"bytes": image_bytes(PIL.Image.fromarray(_drawable(value))), "path": None}
    if not isinstance(value, PIL.Image.Image):
        raise TypeError(f"{type(value).__name__} is no image, no bytes and no path")
    if getattr(value, "filename", ""):
        return {"bytes": None, "path": value.filename}  # type: ignore[attr-defined]
    return {"bytes": image_bytes(value), "path": None}


def image_bytes(image: Image) -> bytes:
    import PIL.Image

    PIL.Image.init()
    known = image.format is not None and image.format in PIL.Image.OPEN and image.format in PIL.Image.SAVE
    out = io.BytesIO()
    image.save(out, format=image.format if known else "PNG" if image.mode in _PLAIN_MODES else "TIFF")
    return out.getvalue()


def _drawable(array: Any) -> Any:
    """An array of a type that Pillow draws: bytes for several channels, else the widest of the kind there is."""
    if array.ndim > 2:
        if array.dtype.kind not in "ui":
            raise TypeError(f"an array of {array.dtype} with channels is no image: uint8 is")
        return array.astype(np.uint8)
    if array.dtype.kind == "b" or array.dtype.str[1:] in ("u1", "u2", "i2", "u4", "i4", "f4", "f8"):
        return array
    narrower = {"u": "u4", "i": "i4", "f": "f4"}.get(array.dtype.kind)
    if narrower is None or array.dtype.itemsize == 1:
        raise TypeError(f"an array of {array.dtype} is no image")
    return array.astype(narrower)
