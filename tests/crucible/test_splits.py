"""Split expressions mean what `datasets` 5.2 means; a slice is a cheap view with the order and state of a split."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crucible
from crucible.dataset import Dataset, IterableDataset
from crucible.errors import SplitNotFound, StateMismatch, UsageError
from crucible.manifest import Manifest, manifest_from_json
from crucible.splits import count, each_split, parse_split, ranges, request_of, split_names, split_texts, take
from tests.fakes.shards import FolderSource, number_split, write_split
from tests.oracle import datasets

ROWS = [50, 1, 30, 7, 100, 5]
TOTAL = sum(ROWS)


@pytest.fixture
def split(tmp_path: Path) -> tuple[Manifest, FolderSource]:
    return number_split(tmp_path, ROWS, batch_rows=16)


def ids(rows: Any) -> list[int]:
    return [row["id"] for row in rows]


BOUND = st.one_of(st.just(""), st.integers(-150, 150).map(str), st.sampled_from(["1_0", "-0", "_", "1__0", "+3", " 2"]))
SLICE = st.builds("[{}{}:{}{}]".format, BOUND, st.sampled_from(["", "%"]), BOUND, st.sampled_from(["", "%"]))
ROUNDING = st.sampled_from(["", "", "(closest)", "(pct1_dropremainder)", "(up)", "()"])
TERM = st.builds(
    "{}{}{}".format,
    st.sampled_from(["train", "test", "a.b", "_x1", "nope", "a-b", ""]),
    st.one_of(st.just(""), SLICE),
    ROUNDING,
)


@given(
    expression=st.lists(TERM, min_size=1, max_size=3).map("+".join),
    rows=st.tuples(*[st.integers(0, 350)] * 4).map(lambda counts: dict(zip(("train", "test", "a.b", "_x1"), counts))),
)
def test_every_expression_gives_the_rows_that_datasets_gives(expression: str, rows: dict[str, int]) -> None:
    try:
        said = datasets.ReadInstruction.from_spec(expression).to_absolute(rows)
        expected = [(one.splitname, one.from_, one.to) for one in said]
    except ValueError:
        expected = None
    try:
        names = split_names(expression, list(rows))
        got = [*ranges(expression, rows)] if set(names) <= set(rows) else None
    except UsageError as error:
        if "has no rows" in str(error):  # to_absolute does not mind, load_dataset does
            assert expected is not None
            assert all(start == stop for _, start, stop in expected)
            return
        got = None
    assert got == expected


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("train[3]", r"'train\[3\]' cannot be read; write a name, name\[10:20\]"),
        ("train[:101%]", "between -100 and 100"),
        ("train[:10](closest)", "no way to round"),
        ("train[:10%](closest)+test[:10%](pct1_dropremainder)", "different ways"),
        ("train[_:]", "no number"),
        ("train+", "'' cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(expression: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_split(expression)


def test_names_of_an_expression_are_what_has_to_be_fetched() -> None:
    assert split_names("train[:5]+test+train[9:]", ["x"]) == ("train", "test")
    assert split_names("all", ["x", "y"]) == ("x", "y")
    assert request_of(["train[:5]", "test+train"]) == "train+test"
    assert request_of(["train[:5]", "all"]) is None
    assert count("train[:50%] + test", {"train": 11, "test": 2}) == 8
    assert count(None, {"train": 11, "test": 2}) == 13


def test_a_list_or_a_dict_of_splits_keeps_its_shape() -> None:
    wanted = {
        "a": "train",
        "b": ["test", datasets.ReadInstruction("train", to=10, unit="%")],
        "c": (datasets.Split.TEST,),
    }
    assert split_texts(wanted) == ("train", "test", "train[:10%]", "test")
    assert each_split(wanted, len) == {"a": 5, "b": [4, 11], "c": (4,)}
    with pytest.raises(UsageError, match="None"):
        split_texts(["train", None])


class TestSlices:
    @pytest.mark.parametrize("bounds", [(0, 1), (49, 52), (10, 40), (50, 51), (5, 190), (100, 193), (81, 88)])
    def test_a_slice_is_a_view_of_the_shards_it_touches(
        self, split: tuple[Manifest, FolderSource], bounds: tuple[int, int]
    ) -> None:
        manifest, source = split
        start, stop = bounds
        part = take(f"train[{start}:{stop}]", {"train": manifest})
        rows = Dataset(part, source)
        assert len(rows) == stop - start
        assert ids(rows) == list(range(start, stop)) == rows["id"]
        assert rows[-1]["id"] == stop - 1
        assert rows[[0, -1]]["id"] == [start, stop - 1]
        assert rows.column_names == ["id", "text"]
        assert set(source.asked) <= {shard.key for shard in part.shards}
        assert part.size <= sum(shard.size for shard in part.shards) <= manifest.size

    def test_a_sum_may_repeat_rows_and_join_splits(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, ROWS, batch_rows=16)
        parts = {"train": manifest, "test": manifest}
        wanted = [*range(45, 60), *range(40, 90), *range(TOTAL)]
        both = take("train[45:60]+train[40:90]+test", parts)
        assert ids(Dataset(both, source)) == wanted
        assert ids(Dataset(take("all", parts), source)) == [*range(TOTAL), *range(TOTAL)]
        shuffled = IterableDataset(both, source).shuffle(3)
        assert sorted(ids(shuffled)) == sorted(wanted)

    def test_the_whole_split_is_the_split_itself(self, split: tuple[Manifest, FolderSource]) -> None:
        manifest, _ = split
        for expression in ("train", "train[:]", "train[:100%]", "train[-500:500]", "all"):
            assert take(expression, {"train": manifest}) is manifest

    def test_a_slice_of_a_slice_counts_from_its_own_start(self, split: tuple[Manifest, FolderSource]) -> None:
        manifest, source = split
        outer = take("train[30:150]", {"train": manifest})
        assert ids(Dataset(take("train[15:60]", {"train": outer}), source)) == list(range(45, 90))

    def test_no_rows_are_an_error_as_in_datasets(self, split: tuple[Manifest, FolderSource]) -> None:
        manifest, source = split
        with pytest.raises(UsageError, match=r"no rows \(train has 193\)"):
            take("train[:0]", {"train": manifest})
        assert ids(Dataset(take("train[9:3]", {"train": manifest}), source)) == []

    def test_order_state_and_ranks_are_exact(self, split: tuple[Manifest, FolderSource]) -> None:
        manifest, source = split
        stream = IterableDataset(take("train[20:170]", {"train": manifest}), source).shuffle(7)
        whole = ids(stream)
        assert sorted(whole) == list(range(20, 170))
        dealt = [ids(stream.shard(rank, 3)) for rank in range(3)]
        assert [row for turn in zip(*dealt) for row in turn] == whole
        running = iter(stream)
        for _ in range(41):
            next(running)
        state = json.loads(json.dumps(stream.state_dict()))
        again = IterableDataset(take("train[20:170]", {"train": manifest}), source).shuffle(7)
        again.load_state_dict(state)
        assert ids(pickle.loads(pickle.dumps(again))) == whole[41:]
        other = IterableDataset(take("train[20:171]", {"train": manifest}), source).shuffle(7)
        with pytest.raises(StateMismatch):
            other.load_state_dict(state)

    def test_a_small_slice_is_shuffled_as_datasets_does(self, tmp_path: Path) -> None:
        manifest, source = number_split(tmp_path, ROWS, local_bytes=1 << 20)
        stream = IterableDataset(take("train[25:75%]", {"train": manifest}), source).shuffle(42)
        theirs = datasets.Dataset.from_dict({"id": list(range(TOTAL))}).select(range(round(25 * TOTAL / 100), 145))
        assert ids(stream) == list(theirs.shuffle(seed=42)["id"])

    def test_splits_of_other_columns_are_brought_together(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        train, source = write_split(tmp_path, [pa.table({"a": [1, 2]})])
        test, _ = write_split(tmp_path / "other", [pa.table({"a": [0.5], "b": ["x"]})])
        both = take("train+test", {"train": train, "test": test})
        schema = both.arrow_schema
        assert (schema.names, str(schema.field("a").type)) == (["a", "b"], "double")
        assert both.features is None or json.loads(both.features)["a"]["dtype"] == "float64"
        assert Dataset(take("train[:1]+test[:0]", {"train": train, "test": test}), source)[0] == {"a": 1.0, "b": None}

    def test_a_slice_has_an_id_of_its_own_and_survives_json(self, split: tuple[Manifest, FolderSource]) -> None:
        manifest, _ = split
        part = take("train[10:60]", {"train": manifest})
        assert part.id != manifest.id
        assert manifest_from_json(part.to_json(), part.id) == part
        assert b"cuts" not in manifest.to_json()


EXPRESSIONS = [
    "train",
    "train+test",
    "all",
    "train[:10%]",
    "train[10%:20%](pct1_dropremainder)",
    "train[100:130]",
    "train[-5:]",
    "train[:-120]+test[1:3]",
    "train[33%:66%]+train[:3]",
    "train[5:3]",
    "train[:0]",
    "nope[:3]",
    "train[2]",
    ["train[:2]", "test"],
    ("test[:1]", "train[-1:]"),
    {"fit": "train[:75%]", "check": "train[75%:]"},
]


def test_loading_slices_gives_the_rows_that_datasets_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "home"))
    repo = tmp_path / "repo"
    repo.mkdir()
    for name, start, stop in (("train-0", 0, 60), ("train-1", 60, 127), ("test", 500, 507)):
        (repo / f"{name}.csv").write_text("id\n" + "".join(f"{number}\n" for number in range(start, stop)))

    def rows(load: Any, wanted: Any, **more: Any) -> Any:
        try:
            found = load(str(repo), split=wanted, **more)
        except (UsageError, SplitNotFound, ValueError):
            return "error"
        if isinstance(wanted, dict):
            return {name: ids(one) for name, one in found.items()}
        return [ids(one) for one in found] if isinstance(wanted, (list, tuple)) else ids(found)

    for wanted in EXPRESSIONS:
        expected = rows(datasets.load_dataset, wanted)
        assert rows(crucible.load_dataset, wanted) == expected, wanted
        assert rows(crucible.load_dataset, wanted, streaming=True) == expected, wanted
