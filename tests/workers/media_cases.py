"""Images, sounds, archives and whole repos of them, made in memory for the tests of media and of archives."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image

Content = bytes | str


def png(shade: int = 1) -> bytes:
    out = io.BytesIO()
    PIL.Image.new("RGB", (4, 3), (shade % 256, 2, 3)).save(out, "PNG")
    return out.getvalue()


def npy(array: object) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array))
    return out.getvalue()


def packed(content: Content) -> bytes:
    return content.encode() if isinstance(content, str) else content


def tar(files: Sequence[tuple[str, Content]], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(packed(content))
            archive.addfile(info, io.BytesIO(packed(content)))
    return out.getvalue()


def zipped(files: Mapping[str, Content], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, packed(content))
    return out.getvalue()
