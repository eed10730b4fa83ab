"""What an admin asks of a running cluster, beside repair and drain: tables, places, pins, eviction, gc.

Every answer is small: figures are added up here, and lists are given by the page. Arguments and answers are plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crucible.cluster.care import Care
from crucible.cluster.ledger import Choice, Entry, Held, held
from crucible.errors import UsageError
from crucible.refs import NodeId

STATUS_WAIT_S = 0.7
"""For the nodes to say how they are. One that does not answer in time is shown by what is known of it."""
LONG_S = 24 * 3600.0
"""For work on a node that takes as long as it takes."""
PAGE = 1000


class Admin:
    """The questions and commands. Concurrency: any method from any thread."""

    def __init__(self, care: Care) -> None:
        self._care = care
        self._counted: dict[str, tuple[tuple[int, int, int], Held]] = {}

    def do(self, what: str, *arguments: Any, **named: Any) -> Any:
        """Call a method of this, or of the upkeep. Raises UsageError for what neither has."""
        for owner in (self, self._care):
            method: Callable[..., Any] | None = None if what.startswith("_") else getattr(owner, what, None)
            if callable(method):
                return method(*arguments, **named)
        raise UsageError(f"the coordinator cannot {what!r}; is it of an older crucible?")

    # --- tables

    def summary(self, node: NodeId | None = None) -> dict[str, Any]:
        """The cluster in figures, and each manifest with how it is held; with `here`, how much of it `node` holds."""
        care = self._care
        care.meet()
        entries = care.ledger.entries()
        told = self._manifests(entries)
        self._counted = {name: self._counted[name] for entry in entries if (name := entry.manifest) in self._counted}
        if node is not None:
            for one, entry in zip(told, entries, strict=True):
                one["here"] = care.agents.catalog.holding(node, entry.keys)
        catalog = care.agents.catalog
        figures = catalog.summary()
        return {
            "nodes": len(care.agents.handles()),
            "silent": len(care.agents.silent()),
            "drained": len(care.drained & care.agents.handles().keys()),
            "shards": figures.shards,
            "copies": sum(count * shards for count, shards in figures.copies.items()),
            "bytes": figures.bytes,
            "lost": sum(one["lost"] for one in told),
            "under": sum(one["under"] for one in told),
            "repair_after": care.repair_after_s,
            "manifests": told,
            "operations": care.operations(),
        }

    def nodes(self) -> list[dict[str, Any]]:
        """One entry a node, by name: what it holds by the catalog, and how it says that it is."""
        care = self._care
        care.meet()
        racks, drained = care.racks(STATUS_WAIT_S), care.drained
        said, problems = care.ask("status", wait_s=STATUS_WAIT_S)
        usage, _ = care.ask("usage", wait_s=STATUS_WAIT_S)
        found = []
        urls, silent = care.agents.urls(), care.agents.silent()
        for node in sorted(urls):
            told: dict[str, Any] = {"node": node, "url": urls[node], "alive": node in said}
            told |= {name: value for name, value in said.get(node, {}).items() if name not in ("shards", "bytes")}
            told |= {
                "state": "silent" if node in silent else "drained" if node in drained else "works",
                "rack": racks.get(node, ""),
                "shards": care.agents.catalog.held(node),
                "bytes": care.agents.catalog.bytes(node),
                "usage": usage.get(node),
                "notes": care.agents.notes_of(node),
            }
            if node in problems:
                told["problem"] = problems[node]
            found.append(told)
        refused = care.agents.refused()
        return found + [
            {"node": node, "alive": False, "state": "refused", "problem": f"refused: {why}"}
            for node, why in sorted(refused.items())
        ]

    def locate(self, ids: Sequence[str], start: int = 0, limit: int | None = PAGE) -> dict[str, Any]:
        """Who holds the shards of these manifests: figures of all of them, and a page of their list, in order."""
        care = self._care
        care.meet()
        entries = {entry.manifest: entry for entry in care.ledger.entries()}
        if any(name not in entries for name in ids):
            care.learn()
            entries = {entry.manifest: entry for entry in care.ledger.entries()}
        chosen = [entries[name] for name in ids if name in entries]
        holders, known, page = care.agents.catalog.holders, care.agents.urls(), []
        skip, room = start, limit
        for entry in chosen:
            stop = len(entry.keys) if room is None else min(len(entry.keys), skip + room)
            for number in range(min(skip, stop), stop):
                key = entry.keys[number].hex()
                nodes = sorted(holders(key))
                urls = [url for node in nodes if (url := known.get(node))]
                page.append(
                    {
                        "split": entry.split,
                        "shard": number,
                        "key": key,
                        "rows": entry.counts[number],
                        "size": entry.sizes[number],
                        "nodes": nodes,
                        "urls": urls,
                    }
                )
            room = None if room is None else max(0, room - max(0, stop - skip))
            skip = max(0, skip - len(entry.keys))
        return {"manifests": self._manifests(chosen), "shards": page}

    def manifests(self, choice: Choice) -> list[dict[str, Any]]:
        """Those that are meant, with how they are held. Raises UsageError when there are none."""
        self._care.meet()
        ids = set(self._care.meant(choice))
        return self._manifests([entry for entry in self._care.ledger.entries() if entry.manifest in ids])

    def _manifests(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        pinned = self._care.pins()
        return [self._manifest(entry, entry.manifest in pinned) for entry in entries]

    def _manifest(self, entry: Entry, pinned: bool) -> dict[str, Any]:
        care = self._care
        replicas = care.ledger.replicas(entry.manifest)
        stamp = (care.agents.catalog.changes, replicas, len(care.agents.handles()))
        known = self._counted.get(entry.manifest)
        if known is None or known[0] != stamp:
            # half a second for a million shards: not again while nothing changes
            known = self._counted[entry.manifest] = stamp, held(entry, *stamp[1:], care.agents.catalog.counts)
        found = known[1]
        return {
            **entry.facts(),
            "replicas": replicas,
            "lost": found.lost,
            "under": found.under,
            "over": found.over,
            "copies": found.copies,
            "pinned": pinned,
        }

    # --- pins

    def pin(self, choice: Choice, note: str = "") -> dict[str, Any]:
        """Keep these manifests on every node, also on those that come later."""
        ids = self._care.meant(choice)
        for manifest_id in ids:
            self._care.order("pin", manifest_id, {"note": note})
        answers, problems = self._care.ask("pin", ids, note)
        return {"manifests": ids, "nodes": len(answers), "problems": problems}

    def unpin(self, choice: Choice) -> dict[str, Any]:
        ids = self._care.meant(choice)
        for manifest_id in ids:
            self._care.order("pin", manifest_id, None)
        answers, problems = self._care.ask("unpin", ids)
        return {"manifests": ids, "nodes": len(answers), "problems": problems}

    # --- room

    def evict(
        self, choice: Choice | None, need_bytes: int = 0, nodes: Sequence[str] = (), dry_run: bool = False
    ) -> dict[str, Any]:
        """Remove the copies of manifests from all nodes, or what is least missed worth `need_bytes` from each of some.

        A manifest that is evicted whole is given up, unless it is pinned: no repair brings it back. What is pinned, in
        use, or the last copy of what cannot be had again stays, and is counted as `kept`.
        """
        care = self._care
        there = [care.node_of(name) for name in nodes] or list(care.agents.handles())
        if choice is None:
            asked: dict[NodeId, list[str] | None] = dict.fromkeys(there)
        else:
            ids = care.meant(choice)
            if not dry_run and not nodes:
                pinned = care.pins()
                care.want([one for one in ids if one not in pinned], 0)
            keys = care.ledger.keys_of(ids)
            asked = {node: [key for key in keys if node in care.agents.catalog.holders(key)] for node in there}
        found: dict[NodeId, dict[str, Any]] = {}
        answers, problems = care.ask_each(
            "evict",
            {node: (some, need_bytes, dry_run) for node, some in asked.items() if some != []},
            wait_s=LONG_S,
        )
        for node, freed in sorted(answers.items()):
            some = asked[node]
            kept = 0 if some is None else len(some) - len(freed)
            found[node] = {"node": node, "shards": len(freed), "bytes": sum(freed.values()), "kept": kept}
            if not dry_run:
                care.agents.dropped(node, list(freed))
        return {"dry_run": dry_run, "nodes": list(found.values()), "problems": problems}

    def gc(self, dry_run: bool = True) -> dict[str, Any]:
        """Remove what nobody needs from every node: what was left behind by crashes, what no manifest names."""
        answers, problems = self._care.ask("litter", dry_run, wait_s=LONG_S)
        found = [{"node": node, **one} for node, many in sorted(answers.items()) for one in many]
        return {"dry_run": dry_run, "litter": found, "problems": problems}
