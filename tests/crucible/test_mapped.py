"""The mapped dataset's columns, names, casts and media, beside `datasets`' own."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.dataset import Dataset, DatasetDict, IterableDataset
from crucible.errors import CorruptFile, SchemaConflict, UsageError
from crucible.feature_types import schema_of
from crucible.features import ClassLabel, Features, Image, List, Value
from crucible.images import decode_image
from tests.fakes.shards import write_split
from tests.oracle import datasets

VALUES = {
    "a": pa.array(range(10), pa.int64()),
    "b": pa.array([f"{number}" for number in range(10)]),
    "c": pa.array([{"x": number, "y": "z"} for number in range(10)]),
    "d": pa.array([[0.5] * number for number in range(10)], pa.list_(pa.float64())),
}
TABLE = pa.table(VALUES)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Dataset, Any]:
    parts = [TABLE.slice(0, 4), TABLE.slice(4, 1), TABLE.slice(5)]
    return Dataset(*write_split(tmp_path, parts, batch_rows=2)), datasets.Dataset(TABLE)


SURFACE = {
    "rows": lambda ds: (ds[0], ds[-1], ds[2:5], ds[::-3], ds[[3, 1, 1]], ds[range(2)], ds[[]], len(ds)),
    "columns": lambda ds: (ds["a"][0], ds["a"][-1], ds["b"][2:4], list(ds["d"]), len(ds["a"]), ds["a"] == [*range(10)]),
    "fields": lambda ds: (ds["c"]["x"][3], list(ds["c"]["y"]), ds["c"]["x"][:2]),
    "facts": lambda ds: (ds.column_names, ds.num_rows, ds.num_columns, ds.shape, ds.features.to_dict()),
    "select": lambda ds: (ds.select_columns(["d", "a"])[1], ds.select_columns("b").column_names),
    "remove": lambda ds: (ds.remove_columns(["b", "c"])[1], ds.remove_columns("a").column_names),
    "rename": lambda ds: (ds.rename_column("a", "z")[0], ds.rename_columns({"a": "b", "b": "a"})[3]),
    "rename then select": lambda ds: ds.rename_column("c", "q").select_columns(["q", "a"])["q"]["x"][1],
    "numpy": lambda ds: ds.with_format("numpy").rename_column("a", "z")["z"][2:4].tolist(),
    "to_list": lambda ds: (ds.to_list(), ds.to_dict(), ds.rename_column("a", "z").to_dict()["z"]),
    "iter": lambda ds: [batch["a"] for batch in ds.iter(4)] + [len(b["a"]) for b in ds.iter(4, drop_last_batch=True)],
    "casts": lambda ds: (ds.cast_column("a", _theirs(ds, Value("string")))[3], ds.features["a"].dtype),
}


def _theirs(ds: Any, feature: Any) -> Any:
    """The feature as the dataset at hand takes it; ours takes both."""
    return feature if isinstance(ds, Dataset) else datasets.Features.from_dict({"x": feature})["x"]


@pytest.mark.parametrize("look", SURFACE.values(), ids=SURFACE)
def test_it_answers_as_datasets_does(both: tuple[Dataset, Any], look: Any) -> None:
    assert look(both[0]) == look(both[1])


CASTS = {
    "widen": {"a": Value("float32"), "d": List(Value("float32"))},
    "names": {"b": ClassLabel(num_classes=10)},
    "numbers": {"a": ClassLabel(names=list("abcdefghij")), "b": Value("int8")},
    "large": {"b": Value("large_string"), "d": List(Value("int64"))},
    "struct": {"c": {"y": Value("string"), "x": Value("float64")}},
    "too wide": {"a": Value("bool"), "b": Value("null")},
    "not a number": {"c": {"x": Value("int64"), "y": Value("int64")}},
}


@pytest.mark.parametrize("changes", CASTS.values(), ids=CASTS)
def test_a_cast_gives_or_refuses_what_datasets_does(both: tuple[Dataset, Any], changes: dict[str, Any]) -> None:
    mine, theirs = both
    wanted = Features({**mine.features, **changes})
    try:
        expected: Any = theirs.cast(datasets.Features.from_dict(wanted.to_dict()))
    except (ValueError, TypeError, NotImplementedError, pa.ArrowException):
        with pytest.raises(SchemaConflict, match=r"column '[abcd]'"):
            mine.cast(wanted)
        return
    cast = mine.cast(wanted)
    assert cast.features == json.loads(json.dumps(expected.features.to_dict()))
    assert list(cast) == list(expected)
    assert list(cast.to_iterable()) == list(expected)
    assert cast[[7, 0]] == expected[[7, 0]]
    assert pickle.loads(pickle.dumps(cast))[:] == expected[:]
    arrow = cast.with_format("arrow")[2:8]
    assert datasets.Features.from_arrow_schema(arrow.schema) == expected.features


def test_numbers_outside_the_labels_are_refused_where_datasets_lets_them_pass(both: tuple[Dataset, Any]) -> None:
    mine, theirs = both
    assert theirs.cast_column("a", datasets.ClassLabel(num_classes=5))["a"][-1] == 9
    with pytest.raises(SchemaConflict, match=r"'a' is int64 .row 0 of the batch, 5: label 5 of only 5"):
        mine.cast_column("a", ClassLabel(num_classes=5))


def test_what_makes_no_sense_is_refused_by_name(both: tuple[Dataset, Any]) -> None:
    mine, _ = both
    for wrong in (
        lambda: mine.select_columns("nope"),
        lambda: mine.remove_columns(["a", "nope"]),
        lambda: mine.rename_column("nope", "x"),
        lambda: mine.rename_column("a", "b"),
        lambda: mine.rename_columns({"a": "x", "b": "x"}),
        lambda: mine.cast({"a": Value("int8")}),
        lambda: mine.cast_column("nope", Value("int8")),
        lambda: mine.decode(on_error="never"),  # type: ignore[arg-type]
        lambda: list(mine.iter(0)),
    ):
        with pytest.raises(UsageError):
            wrong()
    for missing in (lambda: mine["nope"], lambda: mine["c"]["nope"], lambda: mine["a"]["x"]):
        with pytest.raises(KeyError):
            missing()


@pytest.mark.parametrize("include_nulls", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        pa.array(["b", "a", None, "b", " a"]),
        pa.array([10, 9, 10, -1], pa.int32()),
        pa.array([1.0, 0.5, None, 1.0]),
        pa.array([True, None, False]),
        pa.array([None, None], pa.string()),
    ],
    ids=str,
)
def test_distinct_values_become_labels_as_in_datasets(tmp_path: Path, values: pa.Array, include_nulls: bool) -> None:
    table = pa.table({"other": range(len(values)), "x": values})
    mine = Dataset(*write_split(tmp_path, [table.slice(0, 1), table.slice(1)], schema=table.schema))
    theirs = datasets.Dataset(table).class_encode_column("x", include_nulls=include_nulls)
    encoded = mine.class_encode_column("x", include_nulls=include_nulls)
    assert encoded.features == json.loads(json.dumps(theirs.features.to_dict()))
    assert list(encoded) == list(theirs)
    renamed = encoded.rename_column("x", "z").select_columns("z")
    assert list(pickle.loads(pickle.dumps(renamed))["z"]) == list(theirs["x"])


def test_only_plain_columns_become_labels(both: tuple[Dataset, Any]) -> None:
    for column in ("c", "d", "nope"):
        with pytest.raises(UsageError, match="class_encode_column needs a column of plain values"):
            both[0].class_encode_column(column)
    with pytest.raises(UsageError, match="comes first"):
        both[0].cast_column("a", Value("string")).class_encode_column("a")


def test_labels_keep_their_names(tmp_path: Path) -> None:
    schema = schema_of({"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}})
    ds = Dataset(*write_split(tmp_path, [pa.table({"label": [1, 0, -1]}, schema=schema)]))
    assert ds.features["label"].int2str(ds["label"][:2]) == ["dog", "cat"]
    assert ds.cast_column("label", datasets.ClassLabel(names=["x", "y"])).features["label"].names == ["x", "y"]


# --- media ---


def picture(mode: str = "RGB", *, orientation: int = 0, format_: str = "png") -> bytes:
    out = io.BytesIO()
    image = PIL.Image.new(mode, (2, 3))
    image.paste(1, (0, 0, 1, 1)) if mode in "1LPI" else image.paste("red", (0, 0, 1, 1))
    exif = PIL.Image.Exif()
    if orientation:
        exif[PIL.ExifTags.Base.Orientation] = orientation
    image.save(out, "tiff" if mode == "I" else format_, exif=exif)
    return out.getvalue()


def images(folder: Path, contents: list[Any], **feature: Any) -> Dataset:
    schema = schema_of({"image": {**feature, "_type": "Image"}, "n": {"dtype": "int64", "_type": "Value"}})
    rows = [{"image": None if one is None else {"bytes": one, "path": None}, "n": n} for n, one in enumerate(contents)]
    table = pa.Table.from_pylist(rows, schema=schema)
    return Dataset(*write_split(folder, [table.slice(0, 2), table.slice(2)], batch_rows=2))


@pytest.mark.parametrize("wanted", [None, "RGB", "L"])
def test_images_are_the_pixels_that_datasets_decodes(tmp_path: Path, wanted: str | None) -> None:
    contents = [picture(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I")]
    contents += [picture("RGB", orientation=turn, format_="jpeg") for turn in (0, 1, 3, 6, 8)]
    mine = images(tmp_path, [*contents, None], **({} if wanted is None else {"mode": wanted}))
    files = [str(path) for path in sorted(tmp_path.glob("*.arrow"), key=lambda path: -path.stat().st_size)]
    assert files
    theirs = datasets.Dataset(mine.with_format("arrow")[:])
    for row, expected in zip(mine, theirs, strict=True):
        image, other = row["image"], expected["image"]
        assert (image is None) == (other is None)
        if image is not None:
            assert (image.mode, image.size, image.tobytes()) == (other.mode, other.size, other.tobytes())
    assert mine.decode(False)[:] == theirs.cast_column("image", datasets.Image(decode=False))[:]
    for number in (0, 7, 10):
        block, other = (ds.with_format("numpy")[number]["image"] for ds in (mine, theirs))
        assert (block.dtype, block.tolist()) == (other.dtype, other.tolist())


def test_columns_that_are_not_asked_for_are_not_decoded(tmp_path: Path) -> None:
    broken = images(tmp_path, [b"no image"] * 3)
    assert list(broken["n"]) == [0, 1, 2]
    assert broken.remove_columns("image")[1] == {"n": 1}
    assert broken.decode(False)[0]["image"] == {"bytes": b"no image", "path": None}
    assert broken.cast_column("image", Image(decode=False)).features["image"].decode is False
    assert broken.to_list()[0]["image"]["bytes"] == b"no image"
    assert broken.decode(False).decode().features["image"] == {"_type": "Image"}


READS: dict[str, Any] = {
    "a row": lambda ds: ds[3],
    "a slice": lambda ds: ds[2:5],
    "rows": lambda ds: ds[[0, 3]],
    "a column": lambda ds: ds["image"][3],
    "all": list,
    "a stream": lambda ds: list(ds.to_iterable()),
    "shuffled batches": lambda ds: list(ds.to_iterable().shuffle(3).shard(0, 1).batch(2)),
    "numpy": lambda ds: list(ds.with_format("numpy")),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_broken_image_names_its_row_and_shard(tmp_path: Path, read: Any) -> None:
    ds = images(tmp_path, [picture(), None, picture(), b"broken", picture()])
    with pytest.raises(CorruptFile, match=r"row 3 \(shard [0-9a-f]{12}, row 1\), column 'image': not an image"):
        read(ds)


def test_broken_images_are_skipped_and_counted_when_asked(tmp_path: Path) -> None:
    ds = images(tmp_path, [b"", picture(), b"broken", None, b"x", b"y"]).decode(on_error="skip")
    assert [row["n"] for row in ds] == [1, 3]
    assert ds.skipped == 4
    with pytest.raises(CorruptFile, match="row 2 "):
        ds[2]
    for format_ in (None, "numpy"):
        stream = ds.with_format(format_).to_iterable()
        assert [row["n"] for row in stream] == [1, 3]
        assert stream.skipped == 4
        batches = list(stream.batch(2))
        assert [list(batch["n"]) for batch in batches] == [[1], [3]]
    resumed = ds.to_iterable()
    iterator = iter(resumed)
    next(iterator)
    state = resumed.state_dict()
    assert state["position"] == 2  # the row that was left out counts as read
    again = ds.to_iterable()
    again.load_state_dict(state)
    assert [row["n"] for row in again] == [3]


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = images(tmp_path, [picture()])
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(CorruptFile, match=r"row 0 .*refused: .*6 pixels"):
        ds[0]


def sample(format_: str) -> bytes:
    out = io.BytesIO()
    PIL.Image.effect_noise((8, 8), 50).convert("RGB").save(out, format_)
    return out.getvalue()


WHOLE = {name: sample(name) for name in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damaged_images_end_in_pixels_or_in_our_error(name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    with warnings.catch_warnings(), contextlib.suppress(CorruptFile):
        warnings.simplefilter("ignore")
        image = decode_image({"bytes": bytes(content), "path": None})
        assert isinstance(image, PIL.Image.Image)


def test_what_pillow_would_hand_to_a_program_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        pytest.fail("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    with pytest.raises(CorruptFile, match="not an image"):
        decode_image({"bytes": sample("EPS"), "path": None})


def test_audio_is_carried_and_its_decoding_says_what_it_needs(tmp_path: Path) -> None:
    schema = schema_of({"audio": {"sampling_rate": 8000, "_type": "Audio"}})
    table = pa.Table.from_pylist([{"audio": {"bytes": b"RIFF", "path": "a.wav"}}], schema=schema)
    ds = Dataset(*write_split(tmp_path, [table]))
    with pytest.raises(UsageError, match=r"'audio' is audio.*torchcodec"):
        ds[0]
    assert ds.decode(False)[0] == {"audio": {"bytes": b"RIFF", "path": "a.wav"}}
    assert ds.features["audio"].sampling_rate == 8000
    shard = str(next(tmp_path.glob("*.arrow")))
    theirs = datasets.load_dataset("arrow", data_files=shard, split="train")
    assert theirs.features["audio"] == datasets.Audio(sampling_rate=8000)


def test_a_dict_of_splits_transforms_each(both: tuple[Dataset, Any]) -> None:
    mine = DatasetDict({"train": both[0], "test": both[0]})
    theirs = datasets.DatasetDict({"train": both[1], "test": both[1]})
    for look in (
        lambda splits: splits.select_columns(["b", "a"]),
        lambda splits: splits.remove_columns("c").rename_column("a", "z"),
        lambda splits: splits.rename_columns({"a": "b", "b": "a"}).select_columns(["a"]),
        lambda splits: splits.select_columns("a").cast_column("a", _theirs(splits["test"], Value("string"))),
    ):
        assert {name: list(split) for name, split in look(mine).items()} == {
            name: list(split) for name, split in look(theirs).items()
        }
    chosen = mine.select_columns("a")
    assert (chosen.shape, chosen.num_columns) == ({"train": (10, 1), "test": (10, 1)}, {"train": 1, "test": 1})
    assert chosen.cast({"a": Value("int8")}).with_format("numpy")["test"][0]["a"] == 0
    assert chosen.decode(on_error="skip")["train"].skipped == 0


def test_streams_take_the_same_views(tmp_path: Path) -> None:
    stream = IterableDataset(*write_split(tmp_path, [TABLE]))
    view = stream.rename_column("a", "z").cast_column("z", Value("float32")).remove_columns(["c", "d"])
    assert next(iter(view)) == {"z": 0.0, "b": "0"}
    assert view.features == {"z": Value("float32"), "b": Value("string")}
    with pytest.raises(SchemaConflict, match="'z'"):
        list(stream.rename_column("a", "z").cast_column("z", ClassLabel(num_classes=2)))
    assert np.asarray(next(iter(view.with_format("numpy").batch(3)))["z"]).dtype == np.float32
