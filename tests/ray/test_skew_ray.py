"""Nodes of other versions join a real cluster: they are named, and no shard of theirs gets among the others'.

Such a node's processes run the code of this checkout; a `sitecustomize` on their path, and on nobody else's, makes it
another version before anything of crucible runs.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import crucible
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.errors import VersionSkew
from crucible.session import nodes as look
from tests.hubserver.faults import FaultyHub
from tests.ray.jobs import chat_files, file_bytes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

OTHER_PROTOCOL = "import crucible.versions\ncrucible.versions.PROTOCOL = 99\n"
OTHER_WRITER = """
import crucible.versions
plain = crucible.versions.installed
crucible.versions.installed = lambda package: "19.0.1" if package == "pyarrow" else plain(package)
import crucible.workers.sample
crucible.workers.sample.ROWS = 299
import time
now = time.time
time.time = lambda: now() + 3600
"""


def join(nodes: Any, folder: Path, hook: str) -> str:
    """A node whose processes begin with `hook`; its id."""
    (folder / "hook").mkdir(parents=True, exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(hook)
    before = set(nodes.alive())
    plain = nodes.environment
    nodes.environment = {**plain, "PYTHONPATH": str(folder / "hook")}
    try:
        nodes.join(folder / "store")
    finally:
        nodes.environment = plain
    (joined,) = set(nodes.alive()) - before
    return str(joined)


def test_nodes_of_other_versions_are_named_and_make_no_shard(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.import_folder("org/chat", chat_files(tmp_path / "repo", files=6, rows=2000))
    nodes = start_nodes(2, hub.endpoint, CRUCIBLE_SHARD_BYTES="524288")
    (tmp_path / "foreign" / "store").mkdir(parents=True)
    (tmp_path / "foreign" / "store" / "VERSION").write_text("99\n")
    foreign = join(nodes, tmp_path / "foreign", OTHER_PROTOCOL)
    writer = join(nodes, tmp_path / "writer", OTHER_WRITER)

    report = crucible.prefetch("org/chat", split="train", address=nodes.address)
    assert report.rows == 12_000
    assert {node for node, _, _ in report.nodes} <= set(nodes.alive()) - {foreign, writer}
    refusals = " ".join(note for note in report.notes if note.startswith(f"node {foreign[:12]}"))
    assert "protocol 99, the coordinator has" in refusals
    assert "a store of layout 99, this crucible reads 1" in refusals
    assert [path.name for path in (tmp_path / "foreign" / "store").iterdir()] == ["VERSION"]
    about_writer = " ".join(note for note in report.notes if note.startswith(f"node {writer[:12]}"))
    assert "pyarrow 19.0.1" in about_writer
    assert "converts nothing" in about_writer
    assert "clock" in about_writer
    assert "ahead" in about_writer
    assert list(Store(tmp_path / "writer" / "store").shards()) == []

    shown = look(nodes.address)
    (refused,) = [node for node in shown if node["node"] == foreign]
    assert not refused["alive"]
    assert "layout 99" in refused["problem"]
    (left_out,) = [node for node in shown if node["node"] == writer]
    assert left_out["alive"]
    assert any("19.0.1" in note for note in left_out["notes"])
    assert all(node["notes"] == [] for node in shown if node["node"] not in (foreign, writer))

    # what it may do: hold what others made, and serve it
    hub.clear_log()
    monkeypatch.setenv("CRUCIBLE_HOME", str(tmp_path / "writer" / "store"))
    stream: Any = crucible.load_dataset("org/chat", split="train", streaming=True)
    assert [row["id"] for row in stream] == list(range(12_000))
    assert len(list(Store(tmp_path / "writer" / "store").shards())) == report.splits[0].shards
    assert file_bytes(hub) == 0


def test_a_task_that_ray_puts_on_a_node_of_another_conversion_is_refused_there(
    hub: FaultyHub, tmp_path: Path, start_nodes: Any
) -> None:
    import ray

    from crucible.workers.tasks import JobOptions, run_item_task

    hub.import_folder("org/chat", chat_files(tmp_path / "repo", files=1, rows=10))
    nodes = start_nodes(2, hub.endpoint)
    crucible.prefetch("org/chat", split="train", address=nodes.address)
    (manifest,) = Store(nodes.homes[0]).manifests()
    options = JobOptions.of(Settings.from_env())
    for wrong in (replace(options, conversion=options.conversion + 1), replace(options, pyarrow=("1.0.0",))):
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.get(run_item_task.remote(manifest.items[0], wrong, "no-job"))
        assert isinstance(raised.value.cause, VersionSkew)
        assert "node " in str(raised.value.cause)


_OTHER_RAY = """
import sys
import ray._private.utils as utils
utils.compute_version_info = lambda: ("2.1.0", "3.99.1")
from crucible.cli import main
sys.argv = ["crucible", "nodes", "--address", sys.argv[1]]
main()
"""


def test_a_process_with_another_ray_or_python_than_the_cluster_is_told_both(hub: FaultyHub, start_nodes: Any) -> None:
    import ray

    nodes = start_nodes(2, hub.endpoint)
    command = [sys.executable, "-c", _OTHER_RAY, nodes.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert f"it runs Ray {ray.__version__} and Python" in said
    assert "here it is Ray 2.1.0 and Python 3.99.1" in said
    assert f"install ray=={ray.__version__}" in said
