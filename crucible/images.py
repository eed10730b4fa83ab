"""Image bytes to PIL images, and nothing else Pillow could be made to do with bytes from a repo."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from crucible.errors import CorruptFile

if TYPE_CHECKING:
    from PIL.Image import Image


def decode_image(value: dict[str, Any] | None, *, mode: str | None = None, column: str = "image") -> Image | None:
    """The image in `{"bytes": …, "path": …}`, loaded and upright, in `mode` if one is given.

    A null stays None. Raises CorruptFile for bytes that are no image, that are cut short, or that would unpack to more
    pixels than Pillow takes for an attack (a decompression bomb).
    """
    if value is None:
        return None
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
        image: Image = PIL.Image.open(io.BytesIO(content))
        image.load()
        if image.getexif().get(PIL.ExifTags.Base.Orientation) is not None:
            image = PIL.ImageOps.exif_transpose(image)
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise CorruptFile(name, where, f"refused: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, KeyError, MemoryError) as error:
        raise CorruptFile(name, where, f"not an image Pillow can read ({error})") from error
    return image.convert(mode) if mode and mode != image.mode else image
