"""Remove shards from a store to make room: the least missed first, and only what can be had again.

Never: what a manifest pins, what a living process has leased, what was made or used by the job that asks for the room,
and what nobody could bring back. On a node of a cluster its agent evicts for all (`keeping`), and asks the coordinator,
which promises no two nodes the last two copies. Without one a shard goes only when a manifest here has its recipe and
its source answers now.

Concurrency: any number of processes at once. Of two that evict a shard, one counts it. A reader that leases a shard in
the moment it goes finds it gone and fetches it again, or has it mapped and keeps it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from crucible.cache.disk import key_files, write_atomic
from crucible.cache.lease import disk_time
from crucible.cache.pins import Pins
from crucible.cache.quota import NEVER, PEER_COST, SOURCE_COST, Held, choose
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.hub.client import HubRepo, is_folder
from crucible.hub.http import HubHttp
from crucible.refs import RepoRef
from crucible.report import Tally

SOURCE_BAD_S = 5.0
"""How long it is believed, by who remembers it, that a source does not have what it had."""
JOB_LIVES_S = 86_400.0
"""A job none of whose items was begun or found here for so long is over, whatever became of it."""
ROUNDS = 8
"""How often others are asked anew after they refused something."""


class Neighbours(Protocol):
    """What eviction asks of the others."""

    def elsewhere(self, keys: Sequence[str]) -> set[str]:
        """Those that another node holds, as far as is known."""
        ...

    def could_drop(self, keys: Sequence[str]) -> set[str]:
        """Those that are elsewhere, or whose source can still be fetched, as it is now. Promises nothing."""
        ...

    def may_drop(self, keys: Sequence[str]) -> set[str]:
        """Those that go from here now: nobody counts on them any more."""
        ...


class Alone:
    """A node without a cluster: only the sources count. For one eviction; asks each commit of a repo once."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._answers: dict[RepoRef, bool] = {}
        self._found: set[str] = set()
        """That could go a moment ago: there is nobody else who could have taken that back."""

    def elsewhere(self, keys: Sequence[str]) -> set[str]:  # noqa: ARG002 - there is nobody else
        return set()

    def could_drop(self, keys: Sequence[str]) -> set[str]:
        found = self._fetchable(keys)
        self._found |= found
        return found

    def may_drop(self, keys: Sequence[str]) -> set[str]:
        return self._found.intersection(keys) | self._fetchable([key for key in keys if key not in self._found])

    def _fetchable(self, keys: Sequence[str]) -> set[str]:
        wanted, may = set(keys), set[str]()
        if not wanted:
            return may
        for repo, shards, files_of in _recipes(self._store):
            found = [(key, item) for key, item in shards if key in wanted]
            if found and is_folder(repo.repo_id):
                may |= {key for key, item in found if _are_there(repo, files_of(item))}
            elif found and self._answers_now(repo):
                may |= {key for key, _ in found}
            if wanted <= may:
                break
        return may

    def _answers_now(self, repo: RepoRef) -> bool:
        """Whether the Hub still has the commit, and lets us see it."""
        if repo not in self._answers:
            self._answers[repo] = source_answers(repo, self._settings)
        return self._answers[repo]


def source_answers(repo: RepoRef, settings: Settings) -> bool:
    """True if the Hub has this commit now. `settings` carry the endpoint and the token. Asks once."""
    if is_folder(repo.repo_id):
        return Path(repo.repo_id).is_dir()
    if settings.offline:
        return False
    http = HubHttp(replace(settings, tries=1), Tally())
    try:
        return HubRepo(http).has(repo)
    finally:
        http.close()


def evict(
    store: Store,
    need: int,
    neighbours: Neighbours,
    *,
    keys: Collection[str] | None = None,
    since: float | None = None,
    whole: bool = True,
    spare: int = 0,
    dry_run: bool = False,
) -> dict[str, int]:
    """Remove shards worth `need` bytes, or all of `keys` that may go. Returns key -> bytes freed.

    `spare` bytes more go if they may: to look through a big store for each shard that comes would cost too much.

    Nothing is removed when what may go is less than `need`, unless `whole` is False. What was used at `since` or later
    (seconds since 1970) stays, unless it is asked for by its key.
    """
    kept = Pins(store.home).keys() | store.leased()
    now = time.time()
    wanted = None if keys is None else frozenset(keys)
    held: dict[str, Held] = {}
    for key, size, used in usages(store):
        if key in kept or (wanted is not None and key not in wanted):
            continue
        if wanted is None and since is not None and used >= since:
            continue
        held[key] = Held(key, size, max(0.0, now - used), SOURCE_COST)
    need = sum(one.size for one in held.values()) if wanted is not None else need
    if wanted is None and (need <= 0 or (whole and sum(one.size for one in held.values()) < need)):
        return {}
    near = neighbours.elsewhere([one.key for one in _likely(held.values(), need)])
    held = {key: replace(one, cost=PEER_COST if key in near else SOURCE_COST) for key, one in held.items()}
    able: set[str] = set()
    gone: dict[str, int] = {}
    for turn in range(ROUNDS):
        freed = sum(gone.values())
        chosen = choose(held.values(), need + spare - freed)
        # the more were refused, the more are asked about at once
        wider = choose(held.values(), (need + spare - freed) << 2 * turn) if turn else []
        asked = [key for key in dict.fromkeys([*chosen, *wider]) if key not in able]
        refused = set(asked) - (neighbours.could_drop(asked) if asked else set())
        if not refused:
            sizes = {key: held[key].size for key in chosen}
            if whole and wanted is None and freed + sum(sizes.values()) < need:
                break
            if dry_run:
                return sizes
            promised = neighbours.may_drop(chosen) if chosen else set()
            refused = set(chosen) - promised  # somebody has given up another copy meanwhile
            gone |= {key: size for key in chosen if key in promised and (size := store.evict(key))}
        able.update(asked)
        for key in refused:
            held[key] = replace(held[key], cost=NEVER)
        for key in gone:
            held.pop(key, None)
        if not refused:
            break
    return gone


def spare_of(need: int, space: int) -> int:
    """How much more than `need` to free while one is at it, where `space` bytes are all there is: at most 0.5 %."""
    return min(63 * need, space // 200)


def usages(store: Store) -> Iterable[tuple[str, int, float]]:
    """(key, bytes, when it was last used, in seconds since 1970) of every shard."""
    for entry in key_files(store.home / "shards", "arrow"):
        with suppress(FileNotFoundError):
            status = entry.stat()
            yield entry.name.partition(".")[0], status.st_size, max(status.st_atime, status.st_mtime)


def _likely(held: Iterable[Held], need: int) -> list[Held]:
    """Those that may be chosen whatever it costs to get them again: others need not be asked about."""
    ranked = sorted(held, key=lambda one: -one.weight)
    likely, size = [], 0
    for one in ranked:
        if size > need * SOURCE_COST / PEER_COST:
            break
        likely.append(one)
        size += one.size
    return likely


Recipe = tuple[RepoRef, list[tuple[str, int]], Callable[[int], list[tuple[str, int]]]]


def _recipes(store: Store) -> Iterator[Recipe]:
    """(repo, (shard key, item) of each shard, item -> (path, bytes) of its files) of every manifest here.

    Read no further than that: to make a manifest of 50,000 shards takes seconds, and this is asked for each eviction.
    """
    with suppress(FileNotFoundError):
        for path in sorted((store.home / "manifests").glob("*.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != path.stem:
                    continue  # altered: what it says of its source may be wrong
                raw = json.loads(data)
                items = raw["items"]

                def files_of(item: int, items: Any = items) -> list[tuple[str, int]]:
                    return [(str(file["path"]), int(file["size"])) for file in items[item]["files"]]

                made = range(len(items))
                shards = [(shard["key"], shard["item"]) for shard in raw["shards"] if shard["item"] in made]
                yield RepoRef(**raw["repo"]), shards, files_of


def _are_there(repo: RepoRef, files: Sequence[tuple[str, int]]) -> bool:
    """Of a repo that is a folder: its files, with the lengths they had."""
    try:
        return bool(files) and all((Path(repo.repo_id) / path).stat().st_size == size for path, size in files)
    except OSError:
        return False


# --- jobs, whose own shards must not make room for the rest of them


def job_began(store: Store, job: str) -> float:
    """When this node first did something for a run of a job, as its disk counts seconds; now, when it never has.

    <home>/jobs/<job> says so, and is touched each time. A disk that cannot be written forgets it. Jobs that are over
    are swept when a new one is noted.
    """
    path = store.home / "jobs" / quote(job, safe="").replace(".", "%2E")
    with suppress(OSError, ValueError):
        began = float(path.read_text())
        path.touch()
        return began
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    began = disk_time(store.home)
    with suppress(OSError):
        write_atomic(path, repr(began).encode())
        for old, _, over in jobs_seen(store):
            if over:
                old.unlink(missing_ok=True)
    return began


def jobs_since(store: Store) -> float | None:
    """When the oldest job began here that may still be running; None if there is none."""
    return min((began for _, began, over in jobs_seen(store) if not over), default=None)


def jobs_seen(store: Store) -> list[tuple[Path, float, bool]]:
    """(its file, when it began here, whether it is over) of the jobs that this node has worked for."""
    found = []
    with suppress(FileNotFoundError):
        for path in (store.home / "jobs").iterdir():
            with suppress(OSError, ValueError):
                found.append((path, float(path.read_text()), time.time() - path.stat().st_mtime > JOB_LIVES_S))
    return found
