"""The errors about what the Hub has. `crucible.errors` has the whole tree, and is where to import any of it from."""

from __future__ import annotations

from collections.abc import Sequence

from crucible.failure import CrucibleError


class RepoError(CrucibleError):
    """The Hub has no such thing, or not for this user."""


class RepoNotFound(RepoError):
    """No repo of this name that this token may see (the Hub does not tell the two apart)."""

    def __init__(self, repo: str, endpoint: str, hint: str = "") -> None:
        super().__init__(repo, endpoint, hint)
        self.repo, self.endpoint, self.hint = repo, endpoint, hint

    def __str__(self) -> str:
        hint = self.hint or "check the spelling; if it is private, set HF_TOKEN"
        return f"{self.repo}: no such repo on {self.endpoint} ({hint})"


class RevisionNotFound(RepoError):
    def __init__(self, repo: str, revision: str, known: Sequence[str] = ()) -> None:
        super().__init__(repo, revision, tuple(known))
        self.repo, self.revision, self.known = repo, revision, tuple(known)

    def __str__(self) -> str:
        known = f"; there are {', '.join(self.known)}" if self.known else ""
        return f"{self.repo}: no revision {self.revision!r}{known}"


class EntryNotFound(RepoError):
    def __init__(self, repo: str, revision: str, path: str) -> None:
        super().__init__(repo, revision, path)
        self.repo, self.revision, self.path = repo, revision, path

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}: no file {self.path!r}"


class GatedRepo(RepoError):
    def __init__(self, repo: str, endpoint: str, signed_in: bool) -> None:
        super().__init__(repo, endpoint, signed_in)
        self.repo, self.endpoint, self.signed_in = repo, endpoint, signed_in

    def __str__(self) -> str:
        todo = "this token has no access: ask for it" if self.signed_in else "set HF_TOKEN, and ask for access"
        return f"{self.repo}: gated; {todo} at {self.endpoint}/{self.repo}"


class DisabledRepo(RepoError):
    def __init__(self, repo: str) -> None:
        super().__init__(repo)
        self.repo = repo

    def __str__(self) -> str:
        return f"{self.repo}: disabled by the Hub; nothing can be read from it"


class BadCredentials(RepoError):
    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.endpoint = endpoint

    def __str__(self) -> str:
        return f"{self.endpoint} refused the token; set a valid HF_TOKEN, or unset it for public repos"


class ConfigNotFound(RepoError):
    def __init__(self, repo: str, config: str, known: Sequence[str]) -> None:
        super().__init__(repo, config, tuple(known))
        self.repo, self.config, self.known = repo, config, tuple(known)

    def __str__(self) -> str:
        return f"{self.repo}: no config {self.config!r}; there are: {', '.join(self.known)}"


class ConfigRequired(RepoError):
    def __init__(self, repo: str, known: Sequence[str]) -> None:
        super().__init__(repo, tuple(known))
        self.repo, self.known = repo, tuple(known)

    def __str__(self) -> str:
        return f"{self.repo}: choose a config (none is the default); there are: {', '.join(self.known)}"


class SplitNotFound(RepoError):
    def __init__(self, repo: str, config: str, split: str, known: Sequence[str]) -> None:
        super().__init__(repo, config, split, tuple(known))
        self.repo, self.config, self.split, self.known = repo, config, split, tuple(known)

    def __str__(self) -> str:
        return f"{self.repo} (config {self.config!r}): no split {self.split!r}; there are: {', '.join(self.known)}"


class NoDataFiles(RepoError):
    def __init__(self, repo: str, looked_for: str) -> None:
        super().__init__(repo, looked_for)
        self.repo, self.looked_for = repo, looked_for

    def __str__(self) -> str:
        return f"{self.repo}: no data files found ({self.looked_for})"


class ScriptRepo(RepoError):
    """A dataset defined by a Python script. Nothing from a repo is ever executed."""

    def __init__(self, repo: str, script: str, convert_ref: str = "") -> None:
        super().__init__(repo, script, convert_ref)
        self.repo, self.script, self.convert_ref = repo, script, convert_ref

    def __str__(self) -> str:
        todo = f"use --revision {self.convert_ref}" if self.convert_ref else "no parquet branch is there to use instead"
        return f"{self.repo}: defined by {self.script}, which crucible never runs; {todo}"


class InvalidCard(RepoError):
    """README.md metadata that contradicts itself."""

    def __init__(self, repo: str, path: str, problem: str) -> None:
        super().__init__(repo, path, problem)
        self.repo, self.path, self.problem = repo, path, problem

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}: {self.problem}"
