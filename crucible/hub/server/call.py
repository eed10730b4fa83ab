"""One request as the handlers see it, and the steps every repo request goes through first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from .access import Redirect, Refusal, User, check_enabled, may_see, missing
from .options import HubOptions
from .repos import Repo, RepoMeta, Store
from .route import Route
from .signing import Signer

if TYPE_CHECKING:
    from multidict import MultiMapping  # aiohttp's own; only its name is needed


@dataclass(frozen=True, slots=True)
class Hub:
    """What all requests share."""

    store: Store
    options: HubOptions
    signer: Signer


@dataclass(frozen=True, slots=True)
class Call:
    """One request to the Hub's origin. Handlers run in a thread and do blocking reads of the store."""

    hub: Hub
    route: Route
    method: str
    raw_path: str
    raw_query: str
    query: MultiMapping[str]
    body: Mapping[str, Any]
    """The fields of a POST, form or JSON; {} otherwise."""
    user: User | None
    base: str
    """scheme://host[:port] as the client knows this server."""
    cdn_base: str

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("true", "1")

    def number(self, name: str, default: int, *, most: int) -> int:
        raw = self.query.get(name, "")
        return max(1, min(int(raw), most)) if raw.isdecimal() and len(raw) < 19 else default

    def next_link(self, **changes: str) -> dict[str, str]:
        """The Link header to this listing's next page: absolute, with all parameters of this one."""
        fields = [(key, value) for key, value in self.query.items() if key not in changes]
        return {"Link": f'<{self.base}{self.raw_path}?{urlencode([*fields, *changes.items()])}>; rel="next"'}

    def repo(self) -> tuple[Repo, RepoMeta]:
        """The repo this call names, if this caller may see it. Raises Refusal, or Redirect for a renamed repo."""
        store, route = self.hub.store, self.route
        https = self.base.startswith("https:")
        repo = store.find(route.repo_type, route.repo_id)
        if repo is None:
            new_id = store.moved_to(route.repo_type, route.repo_id)
            target = store.find(route.repo_type, new_id) if new_id else None
            if target is not None and may_see(target, target.meta(), self.user):
                raise Redirect(route.renamed(self.raw_path, self.raw_query, target.id))
            raise missing(self.user, https=https)
        meta = repo.meta()
        if not may_see(repo, meta, self.user):
            raise missing(self.user, https=https)
        check_enabled(meta)
        return repo, meta

    def commit(self, repo: Repo) -> str:
        commit = repo.resolve(self.route.revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {self.route.revision}")
        return commit


def no_entry(path: str, commit: str) -> Refusal:
    """Clients remember that this commit has no such file, so the commit is said."""
    return Refusal(404, "EntryNotFound", f"Entry not found: {path}", {"X-Repo-Commit": commit})
