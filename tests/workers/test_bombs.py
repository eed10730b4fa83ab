"""What unpacks to far more than it is, of every kind, in one process that may not have the memory of any of them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SIZE = 384 << 20
"""What each unpacks to."""
BOUND = 256 << 20
"""What the process may have besides what it has before the first."""

CHILD = """
import json, os, resource, sys
from pathlib import Path
import crucible
import crucible.session, crucible.workers.work, crucible.workers.convert, pyarrow.compute, PIL.Image, PIL.PngImagePlugin
from crucible.errors import CrucibleError

def now(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10

said = {}
crucible.load_dataset(sys.argv[1] + "/warm", split="train")[0]
resource.setrlimit(resource.RLIMIT_DATA, (now("VmData:") + int(sys.argv[2]),) * 2)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        rows = crucible.load_dataset(str(folder), split="train")
        said[folder.name] = f"{len(rows)} rows"
        rows[0]
    except CrucibleError as error:
        said[folder.name] = [type(error).__name__, str(error)]
    except BaseException as error:
        said[folder.name] = f"not typed: {type(error).__name__} {error}"
print(json.dumps(said))
"""


def in_pieces(write: Callable[[bytes], object], size: int = SIZE) -> None:
    zeros = bytes(1 << 20)
    for _ in range(size >> 20):
        write(zeros)


def png(folder: Path, width: int, height: int, *before: bytes) -> None:
    """One image; `before` are chunks that come before its pixels."""
    pixels = zlib.compress(bytes(1000))
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), *before, b"IDAT" + pixels, b"IEND"]
    framed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
    (folder / "train").mkdir()
    (folder / "train" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def packed_text() -> bytes:
    packer = zlib.compressobj(1)
    parts: list[bytes] = []
    in_pieces(lambda piece: parts.append(packer.compress(piece)))
    return b"zTXtk\0\0" + b"".join(parts) + packer.flush()


@pytest.fixture
def bombs(tmp_path: Path) -> Path:
    """A folder of repos, each of which is one."""
    root = tmp_path / "repos"
    for name in ("warm", "gz", "xz", "bz2", "zst", "lz4", "zip", "csv", "text", "png", "png-text", "json", "parquet"):
        (root / name).mkdir(parents=True)
    (root / "warm" / "train.jsonl").write_bytes(b'{"a": 1}\n')
    with gzip.open(root / "gz" / "train.jsonl.gz", "wb", compresslevel=1) as file:
        in_pieces(file.write)
    with lzma.open(root / "xz" / "train.jsonl.xz", "wb", preset=0) as xz:
        in_pieces(xz.write)
    with bz2.open(root / "bz2" / "train.jsonl.bz2", "wb", compresslevel=1) as bz:
        in_pieces(bz.write, SIZE // 8)
    for kind, name in (("zstd", "zst"), ("lz4", "lz4")):
        with pa.CompressedOutputStream(str(root / name / f"train.jsonl.{name}"), kind) as stream:
            in_pieces(stream.write)
    for name, inside in (("csv", "train.csv.gz"), ("text", "train.txt.gz")):
        (root / name / inside).write_bytes((root / "gz" / "train.jsonl.gz").read_bytes())
    archive = zipfile.ZipFile(root / "zip" / "train.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("train.jsonl", "w") as member:
        in_pieces(member.write)
    pq.write_table(
        pa.table({"a": pa.array(["x" * (1 << 20)] * (SIZE >> 20)).dictionary_encode()}),
        root / "parquet" / "train.parquet",
    )
    png(root / "png", 60_000, 60_000)
    png(root / "png-text", 1, 1, packed_text())
    (root / "json" / "train.jsonl").write_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    return root


def test_none_takes_more_memory_than_there_is_and_each_is_a_typed_error(bombs: Path, tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in bombs.rglob("*") if path.is_file()) < SIZE // 16
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CRUCIBLE_ROW_BYTES": "4MiB",
        "CRUCIBLE_UNPACKED_BYTES": "64MiB",  # of 384
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # mimalloc takes address space ahead, which counts
        "MALLOC_ARENA_MAX": "2",
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(bombs), str(BOUND)],
        capture_output=True,
        text=True,
        timeout=170,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    said = json.loads(child.stdout)
    assert said.pop("warm") == "1 rows"
    assert {kind for kind, _ in said.values()} == {"CorruptFile"}, said
