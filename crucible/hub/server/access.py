"""Who may see what: tokens, private, gated and disabled repos, and how the Hub says no. No I/O."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from .repos import Repo, RepoMeta


class Refusal(Exception):
    """A request is answered with an error: status, X-Error-Code (may be empty) and X-Error-Message."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, code, message, headers)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class Redirect(Exception):
    """The thing is elsewhere on this origin: answered with a relative 307."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


@dataclass(frozen=True, slots=True)
class User:
    """Whom a token stands for."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "read"
    """read or write."""

    def owns(self, repo: Repo) -> bool:
        return repo.owner == self.name or repo.owner in self.orgs

    def whoami(self) -> dict[str, Any]:
        return {
            "type": "user",
            "id": self.name,
            "name": self.name,
            "fullname": self.name,
            "isPro": False,
            "canPay": False,
            "orgs": [{"type": "org", "id": org, "name": org, "fullname": org} for org in self.orgs],
            "auth": {"type": "access_token", "accessToken": {"displayName": "token", "role": self.role}},
        }


def bearer(authorization: str | None) -> str | None:
    """The token of an Authorization header: Bearer, or the password of Basic, whoever the user is, as git sends it.

    An empty or foreign scheme counts as a wrong token ('').
    """
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(token.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return token.strip() if scheme.lower() == "bearer" else ""


def may_see(repo: Repo, meta: RepoMeta, user: User | None) -> bool:
    return not meta.private or (user is not None and user.owns(repo))


def missing(user: User | None, *, https: bool) -> Refusal:
    """A repo that is not there, or not for this caller; the Hub does not tell the two apart.

    Over https an anonymous caller gets a bare 401. Official clients take that for "no such repo" only when the URL
    begins with https, so over plain http the code is added.
    """
    if user is None:
        return Refusal(401, "" if https else "RepoNotFound", "Invalid username or password.")
    return Refusal(404, "RepoNotFound", "Repository not found")


def check_enabled(meta: RepoMeta) -> None:
    if meta.disabled:  # clients know this case by the exact message and the absence of a code
        raise Refusal(403, "", "Access to this resource is disabled.")


def check_gate(repo: Repo, meta: RepoMeta, user: User | None) -> None:
    """Gated repos let in their owner and who is on their list."""
    if not meta.gated or (user is not None and (user.owns(repo) or user.name in meta.allowed)):
        return
    what = f"Access to {repo.type} {repo.id} is restricted"
    if user is None:
        raise Refusal(401, "GatedRepo", f"{what}. You must have access to it and be authenticated to access it.")
    raise Refusal(403, "GatedRepo", f"{what} and you are not in the authorized list. Ask for access.")
