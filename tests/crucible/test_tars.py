"""The stream of a tar archive's files is that of `tarfile`, whatever dialect and names."""

from __future__ import annotations

import io
import tarfile
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.errors import ConversionError, CorruptFile
from crucible.formats.limits import Limits
from crucible.formats.tars import tar_members

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=120)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
KINDS = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, b"Z"]
FORMATS = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]


def members(content: bytes) -> list[tuple[str, bytes]]:
    return list(tar_members(io.BufferedReader(io.BytesIO(content)), "a.tar", Limits()))  # type: ignore[arg-type]


def expected(content: bytes) -> list[tuple[str, bytes]]:
    found = []
    with tarfile.open(fileobj=io.BytesIO(content), mode="r|") as archive:
        for info in archive:
            if info.isreg():
                file = archive.extractfile(info)
                found.append((info.name, b"" if file is None else file.read()))
    return found


@settings(max_examples=300, deadline=None)
@given(
    files=st.lists(st.tuples(PATHS, st.binary(max_size=1100), st.sampled_from(KINDS)), max_size=6),
    dialect=st.sampled_from(FORMATS),
    link=PATHS,
)
def test_every_dialect_is_read_as_tarfile_reads_it(
    files: list[tuple[str, bytes, bytes]], dialect: int, link: str
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as archive:
        for name, content, kind in files:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mtime = kind, len(content), 1.5 if dialect == tarfile.PAX_FORMAT else 1
            has_data = kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, b"Z")
            if not has_data:
                info.size, info.linkname = 0, link
            with suppress(ValueError):  # a name too long for ustar
                archive.addfile(info)
                if has_data:
                    out.write(content + bytes(-len(content) % 512))
                    archive.offset += len(content) + -len(content) % 512
    assert members(out.getvalue()) == expected(out.getvalue())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000) | st.binary(min_size=512, max_size=600).map(lambda data: bytes(511) + data))
def test_any_bytes_are_files_or_a_typed_error(content: bytes) -> None:
    with suppress(ConversionError):
        members(content)


def test_a_sparse_file_is_refused_and_base_256_sizes_are_read() -> None:
    info = tarfile.TarInfo("a")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(CorruptFile, match="sparse"):
        members(info.tobuf())
    header = bytearray(tarfile.TarInfo("a").tobuf())
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148] + header[156:]))
    assert members(bytes(header) + b"xyz" + bytes(509)) == [("a", b"xyz")]
