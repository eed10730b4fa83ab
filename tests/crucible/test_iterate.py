"""Reading rows of mapped shards in any order, and what happens when a shard is not what it should be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crucible.dataset import IterableDataset
from crucible.errors import CorruptFile, CrucibleError, SchemaConflict, SourceUnavailable, StoreError, UsageError
from crucible.iterate import ShardReader
from crucible.manifest import Manifest
from crucible.order import EpochOrder, OrderSpec, shard_rows
from crucible.reading import read_blocks
from crucible.refs import ShardInfo
from crucible.share import Share
from tests.fakes.shards import FolderSource, number_columns, number_split, write_split

unhurried = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ids_of(table: pa.Table) -> list[int]:
    return list(table.column("id").to_pylist())


def path_of(source: FolderSource, manifest: Manifest, number: int) -> Path:
    return source.folder / f"{manifest.shards[number].key}.arrow"


class TestTakingRows:
    @unhurried
    @given(
        rows=st.lists(st.integers(1, 60), min_size=1, max_size=12),
        batch_rows=st.sampled_from([None, 1, 7, 64]),
        big=st.booleans(),
        data=st.data(),
    )
    def test_any_rows_come_in_the_order_asked_for(
        self, tmp_path: Path, rows: list[int], batch_rows: int | None, big: bool, data: st.DataObject
    ) -> None:
        manifest, source = number_split(tmp_path, rows, batch_rows=batch_rows)
        reader = ShardReader(manifest, source)
        reader._row_bytes = 1 << 20 if big else 1  # big rows are gathered in another way
        wanted = data.draw(st.lists(st.integers(0, sum(rows) - 1), max_size=80, unique=True))
        table = reader.take(np.array(wanted, dtype=np.int64))
        assert ids_of(table) == wanted
        assert table.column("text").to_pylist() == [f"row {number}" for number in wanted]

    def test_a_row_may_be_asked_for_twice(self, tmp_path: Path) -> None:
        reader = ShardReader(*number_split(tmp_path, [20, 20]))
        assert ids_of(reader.take(np.array([3, 3, 30, 3]))) == [3, 3, 30, 3]

    def test_long_runs_are_slices_of_the_map_and_copy_nothing(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [5_000, 5_000], batch_rows=1_000)
        reader = ShardReader(manifest, source)
        before = pa.total_allocated_bytes()
        table = reader.take(np.arange(500, 9_500))
        assert pa.total_allocated_bytes() == before
        assert table.column("id").num_chunks == 10
        assert ids_of(table) == list(range(500, 9_500))

    @pytest.mark.parametrize("size", [10, 20_000])
    def test_scattered_rows_are_copied_into_one_piece_whatever_their_size(self, tmp_path: Path, size: int) -> None:
        texts = [f"{row:03}" + "x" * size for row in range(100)]
        narrow = pa.table({"text": texts[:50]})
        wide = pa.table({"text": pa.array(texts[50:]), "n": pa.array(range(50))})
        manifest, source = write_split(tmp_path, [narrow, wide], schema=wide.schema, batch_rows=20)
        wanted = np.random.default_rng(2).permutation(100)
        table = ShardReader(manifest, source).take(wanted)
        assert table.column("text").num_chunks == 1
        assert table.column("text").to_pylist() == [texts[row] for row in wanted]
        assert table.column("n").to_pylist() == [row - 50 if row >= 50 else None for row in wanted.tolist()]

    def test_rows_outlive_the_file(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [100])
        table = ShardReader(manifest, source).slice(0, 100)
        path_of(source, manifest, 0).unlink()  # evicted while in use
        assert ids_of(table) == list(range(100))

    def test_no_rows_are_a_table_with_the_right_columns(self, tmp_path: Path) -> None:
        reader = ShardReader(*number_split(tmp_path, [3]))
        assert reader.take(np.array([], dtype=np.int64)).schema.names == ["id", "text"]

    def test_no_more_shards_stay_open_than_allowed(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [2] * 30)
        reader = ShardReader(manifest, source, most_open=4)
        assert sorted(ids_of(reader.take(np.random.default_rng(1).permutation(60)))) == list(range(60))
        assert reader.open_shards == 4

    def test_an_order_that_draws_on_more_shards_than_may_be_mapped_is_still_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("crucible.iterate.OPEN_SHARDS", 5)
        stream = IterableDataset(*number_split(tmp_path, [1] * 50, local_bytes=1 << 30)).shuffle(1)
        assert sorted(row["id"] for row in stream) == list(range(50))
        reader = stream._leaves[0]._reader
        assert reader is not None
        assert reader.open_shards == 5

    def test_a_lane_reader_opens_each_shard_once_within_its_bound(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [10] * 40)
        order = EpochOrder(shard_rows(manifest), OrderSpec("lanes", 5, 0, 8, 3))
        bound = order.open_shards(1, 4)
        reader = ShardReader(manifest, source, most_open=bound)
        reader.block_rows = 8
        for block in read_blocks(order, Share(1, 4), order.total, reader.block_rows):
            assert reader.take(block.ids).num_rows <= 8
            assert reader.open_shards <= bound
        assert bound == 2 * 3
        assert source.note()["disk"] <= 2 * len(order.shards_of_rank(1, 4))  # a block may straddle two windows

    def test_only_chosen_columns_are_read(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [5])
        assert ShardReader(manifest, source, columns=("text",)).slice(0, 2).to_pylist() == [
            {"text": "row 0"},
            {"text": "row 1"},
        ]
        with pytest.raises(UsageError, match="no column 'x'; there are: id, text"):
            ShardReader(manifest, source, columns=("x",))


class TestShardsOfAnotherSchema:
    @pytest.fixture
    def mixed(self, tmp_path: Path) -> tuple[Manifest, FolderSource]:
        narrow = pa.table({"id": pa.array([0, 1, 2], pa.int32())})
        wide = pa.table({"id": pa.array([3, 4], pa.int64()), "text": pa.array(["d", "e"])})
        return write_split(tmp_path, [narrow, wide], schema=wide.schema)

    @pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [4, 0, 3, 2, 1], [2]])
    def test_they_are_cast_to_the_schema_of_the_manifest(
        self, mixed: tuple[Manifest, FolderSource], ids: list[int]
    ) -> None:
        table = ShardReader(*mixed).take(np.array(ids))
        assert table.schema.field("id").type == pa.int64()
        text = [None, None, None, "d", "e"]
        assert table.to_pylist() == [{"id": number, "text": text[number]} for number in ids]

    def test_a_cast_reads_only_the_chosen_columns(self, mixed: tuple[Manifest, FolderSource]) -> None:
        assert ShardReader(*mixed, columns=("text",)).slice(2, 4).to_pylist() == [{"text": None}, {"text": "d"}]

    def test_values_that_do_not_fit_raise(self, tmp_path: Path) -> None:
        words = pa.table({"id": pa.array(["x"])})
        manifest, source = write_split(tmp_path, [words], schema=pa.schema([("id", pa.int64())]))
        with pytest.raises(SchemaConflict):
            ShardReader(manifest, source).slice(0, 1)


class TestShardsThatAreNotWhatTheyShouldBe:
    """Never wrong data, never a gap: each of these raises an error that names the shard or its file."""

    def test_a_missing_shard_raises(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [5, 5, 5])
        path_of(source, manifest, 1).unlink()
        reader = ShardReader(manifest, source)
        with pytest.raises(SourceUnavailable):
            reader.take(np.arange(15))

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data[: len(data) // 2],
            lambda data: b"",
            lambda data: b"not arrow at all" * 100,
            lambda data: data[:-20] + b"\0" * 20,
            lambda data: b"\0" * 300 + data[300:],
        ],
        ids=["cut short", "empty", "another file", "no footer", "no header"],
    )
    def test_a_broken_file_is_named(self, tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
        manifest, source = number_split(tmp_path, [50, 50])
        path = path_of(source, manifest, 1)
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(CorruptFile) as caught:
            ShardReader(manifest, source).take(np.array([0, 60, 70]))
        assert str(path) in str(caught.value)
        assert manifest.shards[1].key[:12] in str(caught.value)

    def test_another_number_of_rows_is_refused(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [5])
        write_split(tmp_path, [pa.table(number_columns(0, 4))])  # the same name, one row less
        with pytest.raises(CorruptFile, match="holds 4 rows, the manifest says 5"):
            ShardReader(manifest, source).slice(0, 5)

    def test_other_columns_are_refused(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, [2])
        write_split(tmp_path, [pa.table({"id": [1, 2]})])
        with pytest.raises(CorruptFile, match="other columns"):
            ShardReader(manifest, source).slice(0, 2)

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_shard_evicted_before_it_is_mapped_is_asked_for_again_once(self, tmp_path: Path, times: int) -> None:
        manifest, _ = number_split(tmp_path, [2])
        reader = ShardReader(manifest, Evicting(tmp_path, evictions=times))
        if times == 1:
            assert ids_of(reader.slice(0, 2)) == [0, 1]
        else:
            with pytest.raises(StoreError, match="vanished twice") as caught:
                reader.slice(0, 2)
            assert isinstance(caught.value, CrucibleError)


@dataclass
class Evicting(FolderSource):
    """Names a file that is gone when it is opened, `evictions` times."""

    evictions: int = 1

    def path(self, manifest: Manifest, shard: ShardInfo) -> Path:
        self.evictions -= 1
        return super().path(manifest, shard) if self.evictions < 0 else self.folder / "gone.arrow"
