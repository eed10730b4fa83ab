"""Imports go one way: crucible.cli, crucible.session -> cluster -> workers -> the crucible base. Never back.

The graph is drawn from the syntax trees, so an import inside a function or under TYPE_CHECKING is an arrow as well: a
type that must come from above belongs below.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up. A module may import its own layer and those below it.
LAYERS = ("base", "workers", "cluster", "session", "cli")

# Only these start, join or speak to Ray. Everything else is plain Python that runs and is tested without it.
MAY_IMPORT_RAY = {
    "crucible.cluster.agents",
    "crucible.cluster.answering",
    "crucible.cluster.connect",
    "crucible.cluster.coordinator",
    "crucible.cluster.executor",
    "crucible.cluster.greeting",
    "crucible.cluster.hands",
    "crucible.cluster.roster",
    "crucible.cluster.turns",
    "crucible.workers.leaving",
    "crucible.workers.replicas",
    "crucible.workers.tasks",
    "crucible.workers.daemon",
    "crucible.workers.governing",
    "crucible.workers.granting",
}

# `crucible/__init__.py` offers names of the top by `__getattr__`; for type checkers it must also import them.
IS_THE_FRONT_DOOR = "crucible"

HEAVY = (
    "ray",
    "pyarrow",
    "numpy",
    "httpx",
    "urllib3",
    "huggingface_hub",
    "aiohttp",
    "PIL",
    "torch",
    "datasets",
    "click",
    "rich",
)


class Arrow(NamedTuple):
    source: str
    target: str
    place: str

    def __str__(self) -> str:
        return f"{self.place}: {self.source} imports {self.target}"


def layer_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in ("workers", "cluster", "session", "cli"):
        return parts[1]
    return "cli" if module in ("crucible.__main__", IS_THE_FRONT_DOOR) else "base"


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of the package, the two rooms by their real folders."""
    for room, prefix in (("crucible", "crucible"), ("workers", "crucible.workers"), ("cluster", "crucible.cluster")):
        for path in sorted((ROOT / room).rglob("*.py")):
            inside = path.relative_to(ROOT / room)
            if room == "crucible" and inside.parts[0] in ("workers", "cluster"):
                continue  # the links; their files come under their own folders
            dotted = ".".join((prefix, *inside.with_suffix("").parts)).removesuffix(".__init__")
            yield dotted, path


def arrows_of(module: str, path: Path) -> Iterator[Arrow]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from crucible import session` is an arrow to crucible.session; of `from x.y import name` x.y is enough.
            targets = [f"{base}.{alias.name}" for alias in node.names] if base == "crucible" else [base]
        for target in targets:
            yield Arrow(module, target, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")


def all_arrows() -> list[Arrow]:
    return [arrow for module, path in sources() for arrow in arrows_of(module, path)]


def test_no_import_goes_back_up() -> None:
    back = [
        str(arrow)
        for arrow in all_arrows()
        if arrow.target.split(".")[0] == "crucible"
        and LAYERS.index(layer_of(arrow.target)) > LAYERS.index(layer_of(arrow.source))
        and arrow.target not in ("crucible.__version__", "crucible.CrucibleError", "crucible.errors")
    ]
    assert back == []


def test_nothing_inside_comes_in_by_the_front_door() -> None:
    """`from crucible import Dataset` works for users; inside it would load the top to reach the base."""
    offered = {
        f"crucible.{name}" for name in ("Dataset", "DatasetDict", "IterableDataset", "load_dataset", "prefetch", "plan")
    }
    assert [str(arrow) for arrow in all_arrows() if arrow.target in offered] == []


def test_a_room_is_never_named_by_its_folder() -> None:
    assert [str(a) for a in all_arrows() if a.target.split(".")[0] in ("workers", "cluster", "tests", "scripts")] == []


def test_ray_is_imported_where_it_may_be_only() -> None:
    assert [str(a) for a in all_arrows() if a.target.split(".")[0] == "ray" and a.source not in MAY_IMPORT_RAY] == []


def test_the_oracle_is_never_imported_at_run_time() -> None:
    assert [str(a) for a in all_arrows() if a.target.split(".")[0] in ("datasets", "pandas")] == []


@pytest.mark.parametrize(
    ("module", "source", "targets"),
    [
        ("crucible.hub.client", "def f():\n    from ..cluster import plan", ["crucible.cluster"]),
        ("crucible.hub.client", "from . import tree", ["crucible.hub"]),
        ("crucible.refs", "if TYPE_CHECKING:\n    from crucible import session", ["crucible.session"]),
        ("crucible.refs", "from .session import plan", ["crucible.session"]),
        ("crucible.refs", "import ray.util, os", ["ray.util", "os"]),
    ],
)
def test_the_graph_sees_every_way_of_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, targets: list[str]
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "m.py"
    path.write_text(source)
    assert [arrow.target for arrow in arrows_of(module, path)] == targets


def run_python(script: str, cwd: Path) -> str:
    """Run `script` as a file in `cwd`, as a user does: its folder comes first on sys.path, this checkout after it."""
    (cwd / "train.py").write_text(textwrap.dedent(script))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "train.py"], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_importing_crucible_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = run_python(
        f"""
        import crucible, sys
        crucible.errors, crucible.CrucibleError, crucible.__version__, dir(crucible)
        print([name for name in {HEAVY!r} if name in sys.modules])
        """,
        tmp_path,
    )
    assert loaded == "[]"


def test_a_users_own_cluster_and_workers_do_not_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text("mine = 'cluster'")
    (tmp_path / "workers.py").write_text("mine = 'workers'")
    said = run_python(
        """
        import cluster, workers
        import crucible.cluster, crucible.workers
        print(cluster.mine, workers.mine, crucible.cluster.__name__, crucible.workers.__name__)
        """,
        tmp_path,
    )
    assert said == "cluster workers crucible.cluster crucible.workers"


def test_an_unknown_name_is_an_attribute_error() -> None:
    import crucible

    with pytest.raises(AttributeError, match="no attribute 'prefetsch'"):
        crucible.prefetsch  # noqa: B018
    assert set(crucible.__all__) <= set(dir(crucible))
