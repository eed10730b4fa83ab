"""The admin's commands: on a running cluster through its coordinator, or without one on this node's store alone.

Runs in the process of whoever asks. What is asked of a cluster that has no coordinator yet starts one; no Ray is
started. Figures come added up: a cluster of a million shards answers as fast as a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from crucible.cache.store import Store
from crucible.cluster.connect import cluster, import_ray
from crucible.cluster.ledger import EVERYTHING, Choice, Entry
from crucible.config import Settings
from crucible.errors import AgentUnavailable, ClusterError, UsageError
from crucible.manifest import Manifest
from crucible.refs import NodeId
from crucible.workers.asking import Line
from crucible.workers.keeping import Keeping

LOCAL = NodeId("local")
"""This node, where no cluster is asked."""
POLL_S = 0.5
WRONG = ("missing", "wrong size", "wrong bytes", "unreadable manifest")
"""Findings that are a loss. The others are litter."""
Progress = Callable[[Mapping[str, Any]], None]


class Cluster:
    """`with Cluster(address) as ask: ask("summary")`. Raises ClusterUnreachable, and what the coordinator raises."""

    def __init__(self, address: str | None) -> None:
        self._connection = cluster(address or Settings.from_env().ray_address or "auto")
        self._coordinator: Any = None

    def __enter__(self) -> Cluster:
        from crucible.cluster.coordinator import reach_coordinator

        self._connection.__enter__()
        try:
            self._coordinator = reach_coordinator(embedded=False)
        except BaseException:
            self._connection.__exit__()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._connection.__exit__()

    def __call__(self, what: str, *arguments: Any, **named: Any) -> Any:
        return self.get(self._coordinator.care.remote(what, *arguments, **named))

    def jobs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get(self._coordinator.jobs.remote())
        return found

    def rotate_secret(self, overlap_s: float) -> dict[str, Any]:
        told: dict[str, Any] = self.get(self._coordinator.rotate_secret.remote(overlap_s))
        return told

    def get(self, reply: Any) -> Any:
        ray = import_ray()
        try:
            return ray.get(reply)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                "the coordinator was lost; give the command again, it goes on with what is left"
            ) from error

    def finish(self, operation: Mapping[str, Any], on_progress: Progress) -> dict[str, Any]:
        """Wait for an operation's end. An interrupt cancels it: what is done stays done."""
        name = operation["operation"]
        try:
            while True:
                told: dict[str, Any] = self("operation", name, POLL_S)
                on_progress(told)
                if told["phase"] in ("done", "cancelled", "failed"):
                    return told
        except KeyboardInterrupt:
            self("cancel", name)
            raise


def running(address: str | None) -> str | None:
    """The cluster that is meant; None: this node's store alone."""
    return address or Settings.from_env().ray_address


def figures(address: str | None, what: str, *arguments: Any) -> Any:
    """A table of a running cluster: by this node's agent, which takes no second, else by joining the cluster's Ray.

    The agent is asked where no address is said, or `auto`: it is in the cluster that runs on this machine.
    """
    settings = Settings.from_env()
    if {address, settings.ray_address} <= {None, "auto"} and (told := near(what, *arguments)) is not None:
        return told
    with Cluster(address) as ask:
        return ask.jobs() if what == "jobs" else ask(what, *arguments)


def near(what: str, *arguments: Any) -> Any:
    """A table of the cluster whose agent serves this node's store; None where there is none."""
    return Line(Settings.from_env()).figures(what, *arguments)


def jobs(address: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """The jobs that a cluster remembers, oldest first; the last `limit` of them."""
    found: list[dict[str, Any]] = figures(address, "jobs")
    return found if limit is None else found[max(0, len(found) - limit) :]


def repair(
    choice: Choice = EVERYTHING,
    *,
    trim: bool = False,
    replicas: int | None = None,
    dry_run: bool = False,
    address: str | None = None,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Bring every shard to as many nodes as it should be on; what nobody holds is made again from its source.

    `replicas` is from now on how many. `trim` drops what is more than wanted. What an operation did, see docs/cli.md.
    """
    with Cluster(address) as ask:
        if dry_run:
            told: dict[str, Any] = ask("preview", "repair", choice, trim=trim, replicas=replicas)
            return told
        return ask.finish(ask("start_repair", choice, trim=trim, replicas=replicas), on_progress)


def set_repair_after(seconds: float | None, address: str | None = None) -> None:
    """How long after a loss a cluster repairs by itself; None: never."""
    with Cluster(address) as ask:
        ask("set_repair_after", seconds)


def rebalance(
    *, dry_run: bool = False, address: str | None = None, on_progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Give nodes that hold too little their share of the shards. Moves nothing else."""
    with Cluster(address) as ask:
        if dry_run:
            told: dict[str, Any] = ask("preview", "rebalance")
            return told
        return ask.finish(ask("start_rebalance"), on_progress)


def drain(
    nodes: Sequence[str],
    *,
    grace_s: float | None = None,
    dry_run: bool = False,
    address: str | None = None,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Empty nodes: they get no new work, and what only they hold is copied, last copies first; after `grace_s` no more.

    `left` of what comes back is how many shards only they hold still.
    """
    with Cluster(address) as ask:
        if dry_run:
            told: dict[str, Any] = ask("preview", "drain", nodes=list(nodes))
            return told
        return ask.finish(ask("start_drain", list(nodes), grace_s), on_progress)


def undrain(nodes: Sequence[str], address: str | None = None) -> list[str]:
    """Let nodes have work again; those that were drained."""
    with Cluster(address) as ask:
        found: list[str] = ask("undrain", list(nodes))
        return found


def rotate_secret(address: str | None = None, *, overlap_s: float) -> dict[str, Any]:
    """Change the secret of a running cluster: `number`, `overlap_s`, and `missed`, node -> why. See `keys`."""
    with Cluster(address) as ask:
        return ask.rotate_secret(overlap_s)


def own_node() -> str:
    """The name of this node in its cluster, by its agent. Raises AgentUnavailable when it has none."""
    from crucible.workers.serve import read_address

    settings = Settings.from_env()
    found = read_address(Store(settings.home))
    if found is None:
        raise AgentUnavailable(
            "here", f"no agent has served {settings.home}; is CRUCIBLE_HOME that of the cluster's node?"
        )
    return found.node


# --- on a cluster, or on this node's store alone


class _Here(Keeping):
    """This node's store, looked after without an agent."""

    def __init__(self, store: Store) -> None:
        self._store, self._node = store, LOCAL

    def chosen(self, choice: Choice) -> list[Manifest]:
        found = [manifest for manifest in self._store.manifests() if choice.means(Entry.of(manifest))]
        if choice and not found:
            raise UsageError(f"{choice}: no manifest in {self._store.home}; `crucible status` lists what there is")
        return found

    def keys(self, choice: Choice) -> tuple[list[str], list[str]]:
        """Shards of the chosen manifests: (those that are here, those that are in quarantine and were not replaced).

        One that is neither was evicted, or never here: nothing is wrong with that.
        """
        aside = {one["key"] for one in self.quarantined()}
        here: dict[str, bool] = {}
        for manifest in self.chosen(choice):
            for shard in manifest.shards:
                if self._store.has_shard(shard):
                    here[shard.key] = True
                elif shard.key in aside:
                    here.setdefault(shard.key, False)
        return [key for key, there in here.items() if there], [key for key, there in here.items() if not there]


def _here() -> _Here:
    return _Here(Store(Settings.from_env().home))


def verify(
    choice: Choice = EVERYTHING,
    *,
    deep: bool = False,
    mend: bool = False,
    address: str | None = None,
    on_progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Look whether the shards are what they should be; `deep` reads them all. `mend` brings back what is not.

    {checked, bytes, findings, left}: `left` counts what is wrong still.
    """
    if (where := running(address)) is not None:
        with Cluster(where) as ask:
            told = ask.finish(ask("start_verify", choice, deep=deep, mend=mend), on_progress)
            found = ask("findings", told["operation"])
        wrong = sum(one["kind"] in WRONG for one in found)
        left = told["left"] if mend else max(told["left"], wrong)
        return {
            **{"checked": told["copied"], "bytes": told["bytes_done"], "findings": found, "left": left},
            "problems": told["problems"],
        }
    here, settings = _here(), Settings.from_env()
    there, gone = here.keys(choice)
    keys = there if choice else None
    sizes = dict(Store(settings.home).shards())
    found = [{"node": str(LOCAL), **one} for one in [*here.verify(keys, deep), *here.verify(gone)]]
    wrong_keys = {one["key"] for one in found if one["kind"] in WRONG}
    problems: list[str] = []
    left = len(wrong_keys)
    if mend and wrong_keys:
        from crucible.workers.scrub import Finding, heal

        fields = [{name: value for name, value in one.items() if name != "node"} for one in found]
        outcome = heal(Store(settings.home), settings, [Finding(**one) for one in fields if one["kind"] in WRONG])
        problems = [f"{key[:12]}: {problem}" for key, problem in outcome.items() if problem]
        left = len(wrong_keys - {key for key, problem in outcome.items() if not problem})
    looked_at = sizes if keys is None else {key: sizes.get(key, 0) for key in keys}
    return {
        **{"checked": len(looked_at), "bytes": sum(looked_at.values()), "findings": found, "left": left},
        "problems": problems,
    }


def evict(
    choice: Choice | None,
    *,
    need_bytes: int = 0,
    nodes: Sequence[str] = (),
    dry_run: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Remove the copies of manifests, or those that are least missed, worth `need_bytes` on each node.

    What is pinned, in use, or the last copy of what cannot be had again stays.
    """
    if (where := running(address)) is not None:
        with Cluster(where) as ask:
            told: dict[str, Any] = ask("evict", choice, need_bytes, list(nodes), dry_run)
            return told
    here = _here()
    keys = None if choice is None else here.keys(choice)[0]
    freed = here.evict(keys, need_bytes, dry_run)
    kept = 0 if keys is None else len(keys) - len(freed)
    line = {"node": str(LOCAL), "shards": len(freed), "bytes": sum(freed.values()), "kept": kept}
    return {"dry_run": dry_run, "nodes": [line], "problems": {}}


def pin(choice: Choice, note: str = "", *, address: str | None = None) -> dict[str, Any]:
    """Keep manifests where they are, whatever else needs the room: on all nodes of a cluster, also on later ones."""
    if (where := running(address)) is not None:
        with Cluster(where) as ask:
            told: dict[str, Any] = ask("pin", choice, note)
            return told
    here = _here()
    return {"manifests": here.pin([one.id for one in here.chosen(choice)], note), "nodes": 1, "problems": {}}


def unpin(choice: Choice, *, address: str | None = None) -> dict[str, Any]:
    """Let manifests be evicted again."""
    if (where := running(address)) is not None:
        with Cluster(where) as ask:
            told: dict[str, Any] = ask("unpin", choice)
            return told
    here = _here()
    return {"manifests": here.unpin([one.id for one in here.chosen(choice)]), "nodes": 1, "problems": {}}


def pins() -> list[dict[str, Any]]:
    """The pins of this node: {manifest, note, since}, oldest first."""
    return _here().pins()


def gc(*, dry_run: bool = True, address: str | None = None) -> dict[str, Any]:
    """Remove what nobody needs: what crashes left behind, what no manifest names, quarantine of last week."""
    if (where := running(address)) is not None:
        with Cluster(where) as ask:
            told: dict[str, Any] = ask("gc", dry_run)
            return told
    found = [{"node": str(LOCAL), **one} for one in _here().litter(dry_run)]
    return {"dry_run": dry_run, "litter": found, "problems": {}}
