"""A million shards on a thousand nodes: short forms by ratios and bytes an item, and the whole by marker."""

from __future__ import annotations

import gc
import importlib.util
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible.cluster import patterns
from crucible.cluster.catalog import Catalog
from crucible.cluster.items import Items, Joined, points_of, sizes_of
from crucible.cluster.patterns import Listing
from crucible.cluster.place import assign, deal, point_of, ring_of
from crucible.cluster.plan import plan_items
from crucible.cluster.resolve import ResolvedSplit
from crucible.cluster.results import Results
from crucible.errors import UnsafePath
from crucible.refs import (
    CONVERSION_VERSION,
    NodeId,
    ReadOptions,
    RepoRef,
    ShardInfo,
    SourceFile,
    WorkItem,
    digest_of,
    item_key,
    safe_repo_path,
)
from crucible.report import ItemResult

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "scale.py"
REPO = RepoRef("org/data", "0" * 40)
OIDS = st.sampled_from([f"{number:064x}" for number in range(4)] + ["é", 'a"b', "", "\u2028"])
FILES = st.lists(st.builds(SourceFile, st.text(max_size=3), st.integers(0, 1 << 40), OIDS, st.booleans()), max_size=5)
NODES = [NodeId(name) for name in "abc"]


def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale_bench", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(deadline=None)
@given(FILES, st.sampled_from(["parquet", "json"]), st.one_of(st.none(), st.just("ü")), st.integers(1, 1 << 40))
def test_a_key_is_the_digest_of_what_it_always_was(
    files: list[SourceFile], builder: str, features: str | None, shard_bytes: int
) -> None:
    options = ReadOptions(builder, (("sep", '"\\t"'),), features)
    inputs = {
        "version": CONVERSION_VERSION,
        "files": [[file.oid, file.size] for file in files],
        "options": options.to_dict(),
        "shard_bytes": shard_bytes,
    }
    assert item_key(files, options, shard_bytes) == digest_of(inputs)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3 << 20), max_size=40), st.sampled_from(["parquet", "webdataset"]), st.integers(0, 40))
def test_items_are_those_that_would_have_been_made_at_once(sizes: list[int], builder: str, cut: int) -> None:
    files = tuple(SourceFile(f"{n}.tar", size, f"{n:064x}", True) for n, size in enumerate(sizes))
    items = plan_items(REPO, ResolvedSplit("train", files, ReadOptions(builder), None), shard_bytes=7)
    made = [WorkItem(i.index, REPO, i.files, i.options, 7) for i in items]
    assert items == made
    assert [item.key for item in items] == [item.key for item in made]
    assert list(sizes_of(items)) == [item.size for item in made]
    assert points_of(items).tolist() == [point_of(item.key) for item in made]
    assert items[-1:] == tuple(made[-1:])
    parts = [items, tuple(made[:cut]), items]
    joined = Joined(parts)
    assert [item.index for item in joined] == list(range(len(joined)))
    assert [item.key for item in joined] == [item.key for part in parts for item in part]
    assert list(joined.sizes) == [item.size for part in parts for item in part]
    assert points_of(joined).tolist() == [point_of(item.key) for part in parts for item in part]
    with pytest.raises(IndexError):
        items[len(items)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 6))
def test_columns_are_dealt_as_items_are(sizes: list[int], count: int) -> None:
    items = Items(
        REPO,
        [SourceFile(str(n), size, f"{n:064x}", True) for n, size in enumerate(sizes)],
        range(1, len(sizes) + 1),
        ReadOptions("parquet"),
        1,
    )
    nodes = {NodeId(f"n{number}"): 1.0 + number for number in range(count)}
    ring = ring_of(nodes)
    dealt = deal(sizes_of(items), points_of(items), ring)
    assert {index: ring.names[home] for index, home in enumerate(dealt)} == assign(items, nodes)


STEP = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 4), st.sampled_from(NODES), st.integers(0, 3)),
    st.tuples(st.just("copied"), st.integers(0, 4), st.sampled_from(NODES), st.integers(0, 2)),
    st.tuples(st.just("lose"), st.integers(0, 4), st.sampled_from(NODES), st.integers(0, 0)),
)


@settings(deadline=None)
@given(st.lists(STEP, max_size=40), st.booleans())
def test_results_say_what_a_dict_of_them_would_say(steps: list[tuple[str, int, NodeId, int]], odd: bool) -> None:
    files = [SourceFile(str(n), n, f"{n:064x}", True) for n in range(5)]
    items = Items(REPO, files, range(1, 6), ReadOptions("parquet"), 1)
    results, model = Results(items), dict[int, tuple[ItemResult, list[set[NodeId]]]]()
    schemas = (("s" * 64, "one"), ("t" * 64, "two"))
    for what, index, node, number in steps:
        if what == "put" and index not in model:
            shards = tuple(
                ShardInfo(
                    items[index].shard_key(n), n, 10 * n, "short" if odd else "d" * 64, schemas[n % 2][0], index, n
                )
                for n in range(number)
            )
            result = ItemResult(index, items[index].key, node, shards, schemas, reused=odd)
            results.put(result)
            model[index] = result, [{node} for _ in shards]
        elif what == "copied" and index in model and number < len(model[index][1]):
            results.copied(index, number, node)
            model[index][1][number].add(node)
        elif what == "lose":
            lost, fewer = results.lose(node)
            had = {index for index, (result, held) in model.items() if any(node in one for one in held)}
            for _, held in model.values():
                for one in held:
                    one.discard(node)
            gone = {index for index in had if not all(model[index][1])}
            assert (set(lost), set(fewer) & had) == (gone, had - gone)
            for index in gone:
                del model[index]
    assert {index: results[index] for index in results} == {index: result for index, (result, _) in model.items()}
    assert len(results) == len(model)
    for index, (result, held) in model.items():
        assert [results.holders(index, place) for place in range(results.count(index))] == held
        assert results.node(index) == result.node
    born = {node: [r for r, _ in model.values() if r.node == node] for node in NODES}
    assert results.births() == {
        node: (sum(len(r.shards) for r in made), sum(s.size for r in made for s in r.shards))
        for node, made in born.items()
        if made
    }
    assert results.reused == (len(model) if odd else 0)


def test_the_coordinators_seconds_grow_as_the_items_do() -> None:
    measure = bench().measure

    def seconds(count: int) -> float:
        return min(
            sum(row["cpu_s"] for row in measure(count, 64) if row["phase"] in ("plan", "place", "track", "catalog"))
            for _ in range(2)
        )

    seconds(500)
    assert seconds(16_000) < 4 * 3 * seconds(4_000)


def kept(make: Callable[[], object]) -> int:
    """Bytes of what `make` gives."""
    gc.collect()
    tracemalloc.start()
    try:
        thing = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] if thing is not None else 0
    finally:
        tracemalloc.stop()


def test_what_is_kept_of_an_item_and_of_a_shard_is_small() -> None:
    count = 20_000
    files = bench().made_up(count)
    items = Items(REPO, files, range(1, count + 1), ReadOptions("parquet"), 1)
    assert kept(lambda: Items(REPO, files, range(1, count + 1), ReadOptions("parquet"), 1)) < 80 * count

    def catalog() -> Catalog:
        made = Catalog()
        for number, item in enumerate(items):
            made.add(NodeId(f"node{number % 64}"), (item.shard_key(0),), (item.size,))
        return made

    assert kept(catalog) < 300 * count

    def results() -> Results:
        made, schema = Results(items), "5" * 64
        for item in items:
            shard = ShardInfo(item.shard_key(0), 1, item.size, item.key, schema, item.index, 0)
            node = NodeId(f"node{item.index % 64}")
            made.put(ItemResult(item.index, item.key, node, (shard,), ((schema, ""),)))
        return made

    assert kept(results) < 200 * count


@pytest.mark.slow
def test_a_million_items_on_a_thousand_nodes() -> None:
    """In a process of its own, for its memory. The figures are printed; the bounds leave room for a busy machine."""
    import subprocess
    import sys

    said = subprocess.run(
        [sys.executable, str(BENCH), "--json"], capture_output=True, text=True, timeout=900, check=True
    ).stdout
    rows = {row["phase"]: row for row in map(json.loads, said.splitlines())}
    print(said)
    assert rows["track"]["peak_rss_bytes"] < 1 << 30
    assert rows["summary"]["cpu_s"] < rows["catalog"]["cpu_s"] / 100
    assert rows["loss"]["cpu_s"] < rows["track"]["cpu_s"] / 10


@settings(deadline=None)
@given(st.text(alphabet="ab.C-_/\\:\0é", max_size=14) | st.integers(190, 260).map(lambda long: f"a/{'b' * long}"))
def test_a_path_is_safe_if_none_of_its_parts_leads_anywhere_else(path: str) -> None:
    parts = path.split("/")
    drive = len(path) > 1 and path[1] == ":" and path[0].isascii() and path[0].isalpha()
    good = all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in parts)
    if good and not drive and "\\" not in path and "\0" not in path:
        assert safe_repo_path("org/data", path) == path
    else:
        with pytest.raises(UnsafePath):
            safe_repo_path("org/data", path)


PATHS = st.lists(st.sampled_from(["train", "test", "x"]), min_size=1, max_size=3).map("/".join)


@settings(deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=60, unique=True), st.sampled_from(["**/train/**", "t*/**", "**/x*", "**"]))
def test_a_glob_over_blocks_finds_what_one_over_all_paths_finds(paths: list[str], pattern: str) -> None:
    files = [SourceFile(path, 1, "0" * 64, True) for path in paths]
    with patch.object(patterns, "_STEP", 7):
        listing = Listing(files)
        found = [file.path for file in listing.glob(pattern)]
        assert found == [file.path for file in listing.glob(pattern)], "the second time from what it remembers"
    glob = patterns.compile_glob(pattern)
    assert found == sorted(path for path in paths if glob.matches(path) and glob.requested(path))
