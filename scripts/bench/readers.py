"""How each loader stores a corpus and reads it again: what `iterate_client.py` runs, one library a process.

A library writes a corpus from parquet files into its folder (`prepare`) and has cases by name, which open what was
written and say what to iterate. The corpus is t (chat rows) or i (JPEG images). Each uses the settings that its own
documentation shows first.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

ROWS = 1000
"""Of a batch in the cases called batches."""
LOADER_ROWS = 64
"""Of a batch that a DataLoader worker makes."""
WORKERS = 2
Case = Callable[[Any], tuple[Iterable[Any], Callable[[Any], int]]]
"""A library, opened on a corpus, to what is iterated and the number of rows in each item."""


def one(_row: Any) -> int:
    return 1


def of_columns(batch: dict[str, Any]) -> int:
    return len(next(iter(batch.values())))


def itself(batch: Any) -> Any:
    return batch


def tables(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of parquet files as dicts."""
    import pyarrow.parquet as pq

    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1000):
            yield from batch.to_pylist()


def pixels(content: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(content))
    image.load()
    return image


class Library:
    """A loader, and where its form of a corpus is."""

    def __init__(self, folder: Path, work: str) -> None:
        self.folder, self.work = folder, work


class Crucible(Library):
    """Ours, from a store on this disk."""

    def prepare(self, files: list[Path]) -> None:
        import crucible

        crucible.load_dataset(str(files[0].parents[1]), split="train")

    def open(self) -> Any:
        import crucible

        return crucible.load_dataset(str(self.folder.parent / self.work), split="train", streaming=True)

    def loader(self) -> Any:
        from torch.utils.data import DataLoader

        stream = self.open().batch(LOADER_ROWS)
        return DataLoader(stream, batch_size=None, num_workers=WORKERS, collate_fn=itself)

    cases: ClassVar[dict[str, Case]] = {
        "rows": lambda lib: (lib.open(), one),
        "shuffled rows": lambda lib: (lib.open().shuffle(1), one),
        "batches": lambda lib: (lib.open().batch(ROWS), of_columns),
        "shuffled batches": lambda lib: (lib.open().shuffle(1).batch(ROWS), of_columns),
        "2 workers": lambda lib: (lib.loader(), of_columns),
        "raw rows": lambda lib: (lib.open().decode(False), one),
        "raw shuffled rows": lambda lib: (lib.open().decode(False).shuffle(1), one),
        "decoded rows": lambda lib: (lib.open(), one),
        "decoded numpy batches of 64": lambda lib: (
            lib.open().with_format("numpy").batch(64),
            of_columns,
        ),
    }

    def resumed(self, done: int) -> tuple[Callable[[], Any], Any]:
        made = self.open().shuffle(1)
        rows = iter(made)
        for _ in range(done):
            next(rows)
        state, wanted = made.state_dict(), next(rows)
        fresh = self.open().shuffle(1)

        def resume() -> Any:
            fresh.load_state_dict(state)
            return next(iter(fresh), None)

        return resume, wanted


class Datasets(Library):
    """The mapped dataset, and its streaming form where that is faster."""

    def prepare(self, files: list[Path]) -> None:  # noqa: ARG002 - it looks for them itself
        self.open()

    def open(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        files = sorted(str(path) for path in (self.folder.parent / self.work / "data").glob("*.parquet"))
        return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(self.folder))

    def raw(self) -> Any:
        import datasets

        return self.open().cast_column("image", datasets.Image(decode=False))

    def loader(self) -> Any:
        from torch.utils.data import DataLoader

        return DataLoader(self.open(), LOADER_ROWS, num_workers=WORKERS, collate_fn=itself)

    cases: ClassVar[dict[str, Case]] = {
        "rows": lambda lib: (lib.open(), one),
        "shuffled rows": lambda lib: (lib.open().to_iterable_dataset(16).shuffle(1), one),
        "batches": lambda lib: (lib.open().iter(ROWS), of_columns),
        "shuffled batches": lambda lib: (lib.open().shuffle(1).iter(ROWS), of_columns),
        "2 workers": lambda lib: (lib.loader(), len),
        "raw rows": lambda lib: (lib.raw(), one),
        "raw shuffled rows": lambda lib: (lib.raw().shuffle(1), one),
        "decoded rows": lambda lib: (lib.open(), one),
        "decoded numpy batches of 64": lambda lib: (
            lib.open().with_format("numpy").iter(64),
            of_columns,
        ),
    }

    def resumed(self, done: int) -> tuple[Callable[[], Any], Any]:
        made = self.open().to_iterable_dataset(16).shuffle(1)
        rows = iter(made)
        for _ in range(done):
            next(rows)
        state, wanted = made.state_dict(), next(rows)
        fresh = self.open().to_iterable_dataset(16).shuffle(1)

        def resume() -> Any:
            fresh.load_state_dict(state)
            return next(iter(fresh), None)

        return resume, wanted


class Mosaic(Library):
    """MosaicML Streaming: MDS shards on this disk."""

    def prepare(self, files: list[Path]) -> None:
        from streaming import MDSWriter

        columns = {"id": "str", "messages": "json"} if self.work == "t" else {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(self.folder), columns=columns) as out:
            for row in tables(files):
                out.write(row if self.work == "t" else {"image": row["image"]["bytes"], "label": row["label"]})

    def open(self, *, shuffle: bool = False, decode: bool = False) -> Any:
        # not the default batch_size of 1: it looks ahead in batches, and would read a fortieth as many rows
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        made = StreamingDataset(local=str(self.folder), shuffle=shuffle, shuffle_seed=1, batch_size=LOADER_ROWS)
        return (pixels(row["image"]) for row in made) if decode else made

    def loader(self) -> Any:
        from torch.utils.data import DataLoader

        made = self.open()
        return DataLoader(made, LOADER_ROWS, num_workers=WORKERS, collate_fn=itself)

    cases: ClassVar[dict[str, Case]] = {
        "rows": lambda lib: (lib.open(), one),
        "shuffled rows": lambda lib: (lib.open(shuffle=True), one),
        "2 workers": lambda lib: (lib.loader(), len),
        "raw rows": lambda lib: (lib.open(), one),
        "raw shuffled rows": lambda lib: (lib.open(shuffle=True), one),
        "decoded rows": lambda lib: (lib.open(decode=True), one),
    }


def _unpack(job: tuple[str, str]) -> Iterator[dict[str, Any]]:
    path, work = job
    for row in tables([Path(path)]):
        yield row if work == "t" else {"image": row["image"]["bytes"], "label": row["label"]}


class Lit(Library):
    """LitData: its optimized chunks on this disk."""

    def prepare(self, files: list[Path]) -> None:
        from litdata import optimize

        inputs = [(str(file), self.work) for file in files]
        optimize(_unpack, inputs=inputs, output_dir=str(self.folder), chunk_bytes="64MB", num_workers=WORKERS)

    def open(self, *, shuffle: bool = False, decode: bool = False) -> Any:
        from litdata import StreamingDataset

        made = StreamingDataset(str(self.folder), shuffle=shuffle, seed=1)
        return (pixels(row["image"]) for row in made) if decode else made

    def loader(self) -> Any:
        from litdata import StreamingDataLoader

        return StreamingDataLoader(self.open(), batch_size=LOADER_ROWS, num_workers=WORKERS, collate_fn=itself)

    cases: ClassVar[dict[str, Case]] = {
        "rows": lambda lib: (lib.open(), one),
        "shuffled rows": lambda lib: (lib.open(shuffle=True), one),
        "2 workers": lambda lib: (lib.loader(), len),
        "raw rows": lambda lib: (lib.open(), one),
        "raw shuffled rows": lambda lib: (lib.open(shuffle=True), one),
        "decoded rows": lambda lib: (lib.open(decode=True), one),
    }

    def resumed(self, done: int) -> tuple[Callable[[], Any], Any]:
        made = self.open(shuffle=True)
        rows = iter(made)
        for _ in range(done):
            next(rows)
        state, wanted = made.state_dict(done, 0, 1), next(rows)
        fresh = self.open(shuffle=True)

        def resume() -> Any:
            fresh.load_state_dict(state)
            return next(iter(fresh), None)

        return resume, wanted


class Web(Library):
    """WebDataset: tar files on this disk."""

    def prepare(self, files: list[Path]) -> None:
        from webdataset import ShardWriter

        with ShardWriter(str(self.folder / "part-%06d.tar"), maxsize=64 << 20, maxcount=10**9, verbose=0) as out:
            for number, row in enumerate(tables(files)):
                values = {"json": row} if self.work == "t" else {"jpg": row["image"]["bytes"], "cls": row["label"]}
                out.write({"__key__": f"{number:09}", **values})

    def open(self, *, shuffle: bool = False, decode: str | None = None) -> Any:
        import webdataset

        files = sorted(str(path) for path in self.folder.glob("*.tar"))
        made = webdataset.WebDataset(files, shardshuffle=100 if shuffle else False, seed=1)
        made = made.shuffle(1000) if shuffle else made
        return made if decode is None else made.decode(*([decode] if decode else []))

    def loader(self) -> Any:
        from torch.utils.data import DataLoader

        return DataLoader(self.open(decode=""), LOADER_ROWS, num_workers=WORKERS, collate_fn=itself)

    cases: ClassVar[dict[str, Case]] = {
        "rows": lambda lib: (lib.open(decode=""), one),
        "shuffled rows": lambda lib: (lib.open(shuffle=True, decode=""), one),
        "2 workers": lambda lib: (lib.loader(), len),
        "raw rows": lambda lib: (lib.open(), one),
        "raw shuffled rows": lambda lib: (lib.open(shuffle=True), one),
        "decoded rows": lambda lib: (lib.open(decode="pil"), one),
    }


class Limit(Library):
    """pyarrow's own conversion, 1,000 rows at a time, with nothing around it."""

    def prepare(self, files: list[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for number, file in enumerate(files):
            table = pq.read_table(file).combine_chunks()
            with (
                pa.OSFile(str(self.folder / f"{number}.arrow"), "wb") as out,
                pa.ipc.new_file(out, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=10_000)

    def open(self) -> Iterator[list[Any]]:
        import pyarrow as pa

        for path in sorted(self.folder.glob("*.arrow")):
            with pa.memory_map(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            for start in range(0, table.num_rows, ROWS):
                yield table.slice(start, ROWS).to_pylist()

    def rows(self) -> Iterator[Any]:
        for rows in self.open():
            yield from rows

    cases: ClassVar[dict[str, Case]] = {
        "rows": lambda lib: (lib.rows(), one),
        "batches": lambda lib: (lib.open(), len),
        "raw rows": lambda lib: (lib.rows(), one),
    }


LIBRARIES: dict[str, Any] = {
    "crucible": Crucible,
    "datasets": Datasets,
    "mosaicml": Mosaic,
    "litdata": Lit,
    "webdataset": Web,
    "limit": Limit,
}


def home(folder: Path) -> None:
    """Nothing of the machine's own caches is used or filled."""
    os.environ["CRUCIBLE_HOME"] = str(folder / "crucible")
    os.environ["HF_HOME"] = str(folder / "hf")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
