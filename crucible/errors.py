"""Every error crucible raises on purpose. Catch `CrucibleError` for all of them.

CrucibleError
├── UsageError (ValueError)            the caller's arguments or environment make no sense          exit code 2
├── RepoError                          the Hub has no such thing, or not for you
│   ├── RepoNotFound  RevisionNotFound  EntryNotFound  GatedRepo  DisabledRepo  BadCredentials
│   ├── ConfigNotFound  ConfigRequired  SplitNotFound  NoDataFiles  ScriptRepo  InvalidCard
├── OfflineMode                        the network is needed and HF_HUB_OFFLINE forbids it
├── TransferError                      bytes did not come, or came wrong
│   ├── SourceUnavailable              connection, timeout, 5xx, 429 after all tries
│   ├── ChecksumMismatch  SizeMismatch a source lied
│   ├── PullIncomplete                 some files of a repo came and some did not
│   └── UnsafePath                     a repo path that would leave its folder
├── ConversionError                    a source file is not what its name says
│   ├── CorruptFile  SchemaConflict  UnsupportedFormat  RowsMismatch
├── StoreError (OSError)               this node's disk
│   ├── DiskFull  NoRoom  StoreReadOnly  StoreVersion
├── ManifestError                      a manifest that is missing, altered or from another version
├── StateMismatch                      a state_dict of another dataset
├── BundleError                        an exported bundle that is not whole, not right or not ours
├── LockMismatch                       what was to be the same as in a lock file is not
└── ClusterError                       Ray, the coordinator or an agent
    ├── ClusterUnreachable  ClusterRefused  AgentUnavailable
    ├── VersionSkew                    a node, process or store of versions that do not go together
    ├── PrefetchFailed                 the job that a reader waited for
    ├── StaleCoordinator               another coordinator acts in this cluster: the older one's word counts no more
    └── JobUnknown  TokenForgotten     what a coordinator that was started again does not know any more

An error keeps its facts as attributes and says what, where and what next in `__str__`. `args` equal the
constructor's arguments, because errors cross Ray by pickling and a class that passes one formatted string to its
base arrives there as another class (tried on ray 2.60).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crucible.failure import CrucibleError as CrucibleError
from crucible.repo_errors import BadCredentials as BadCredentials
from crucible.repo_errors import ConfigNotFound as ConfigNotFound
from crucible.repo_errors import ConfigRequired as ConfigRequired
from crucible.repo_errors import DisabledRepo as DisabledRepo
from crucible.repo_errors import EntryNotFound as EntryNotFound
from crucible.repo_errors import GatedRepo as GatedRepo
from crucible.repo_errors import InvalidCard as InvalidCard
from crucible.repo_errors import NoDataFiles as NoDataFiles
from crucible.repo_errors import RepoError as RepoError
from crucible.repo_errors import RepoNotFound as RepoNotFound
from crucible.repo_errors import RevisionNotFound as RevisionNotFound
from crucible.repo_errors import ScriptRepo as ScriptRepo
from crucible.repo_errors import SplitNotFound as SplitNotFound


class UsageError(CrucibleError, ValueError):
    """Arguments or environment that make no sense. The command line exits with 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class OfflineMode(CrucibleError):
    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted

    def __str__(self) -> str:
        return f"{self.wanted}: not on this disk, and HF_HUB_OFFLINE is set; unset it, or prefetch while online"


class TransferError(CrucibleError):
    """Bytes did not come, or came wrong."""


class SourceUnavailable(TransferError):
    def __init__(self, path: str, source: str, reason: str) -> None:
        super().__init__(path, source, reason)
        self.path, self.source, self.reason = path, source, reason

    def __str__(self) -> str:
        return f"{self.path} from {self.source}: {self.reason}"


class ChecksumMismatch(TransferError):
    """A file's bytes do not hash to what was promised. Nothing of it becomes visible; other sources are tried."""

    def __init__(self, path: str, source: str, expected: str, actual: str) -> None:
        super().__init__(path, source, expected, actual)
        self.path, self.source, self.expected, self.actual = path, source, expected, actual

    def __str__(self) -> str:
        return (
            f"{self.path} from {self.source}: hash {self.actual[:12]}, expected {self.expected[:12]}; bytes discarded"
        )


class SizeMismatch(TransferError):
    def __init__(self, path: str, source: str, expected: int, actual: int) -> None:
        super().__init__(path, source, expected, actual)
        self.path, self.source, self.expected, self.actual = path, source, expected, actual

    def __str__(self) -> str:
        return f"{self.path} from {self.source}: {self.actual:,} bytes, expected {self.expected:,}; bytes discarded"


class PullIncomplete(TransferError):
    """Some files of a repo did not come. Those that did are kept."""

    def __init__(self, repo: str, missing: int, problems: Sequence[str]) -> None:
        super().__init__(repo, missing, tuple(problems))
        self.repo, self.missing, self.problems = repo, missing, tuple(problems)

    def __str__(self) -> str:
        files = "1 file" if self.missing == 1 else f"{self.missing:,} files"
        told = "; ".join(self.problems[:10]) + ("; …" if len(self.problems) > 10 else "")
        return f"{self.repo}: {files} did not come, the others are kept; run the same again ({told})"


class UnsafePath(TransferError):
    def __init__(self, repo: str, path: str) -> None:
        super().__init__(repo, path)
        self.repo, self.path = repo, path

    def __str__(self) -> str:
        return f"{self.repo}: refused path {self.path!r}, which would leave its folder"


class ConversionError(CrucibleError):
    """A source file is not what its name says."""


class CorruptFile(ConversionError):
    def __init__(self, path: str, where: str, problem: str) -> None:
        super().__init__(path, where, problem)
        self.path, self.where, self.problem = path, where, problem

    def __str__(self) -> str:
        where = f" at {self.where}" if self.where else ""
        return f"{self.path}{where}: {self.problem}"


class SchemaConflict(ConversionError):
    def __init__(self, column: str, path: str, type_: str, other_path: str, other_type: str) -> None:
        super().__init__(column, path, type_, other_path, other_type)
        self.column, self.path, self.type = column, path, type_
        self.other_path, self.other_type = other_path, other_type

    def __str__(self) -> str:
        return (
            f"column {self.column!r} is {self.type} in {self.path} but {self.other_type} in {self.other_path}; "
            "state `features` in the card, or choose data files that agree"
        )


class UnsupportedFormat(ConversionError):
    def __init__(self, path: str, known: Sequence[str]) -> None:
        super().__init__(path, tuple(known))
        self.path, self.known = path, tuple(known)

    def __str__(self) -> str:
        return f"{self.path}: no reader for this format; readable are {', '.join(self.known)}"


class RowsMismatch(ConversionError):
    """A card that declares other rows than the files have: files are missing, or the card is out of date."""

    def __init__(self, repo: str, mismatches: Sequence[tuple[str, int, int]]) -> None:
        """`mismatches` are (split, rows that the card declares, rows that there are)."""
        super().__init__(repo, tuple(mismatches))
        self.repo, self.mismatches = repo, tuple(mismatches)

    def __str__(self) -> str:
        said = ", ".join(f"{name} has {there:,} of {declared:,} rows" for name, declared, there in self.mismatches)
        return (
            f"{self.repo}: not the rows that its card declares in `dataset_info` ({said}); if the card is out of date, "
            "load it with verification_mode='no_checks' (--set verification_mode=no_checks)"
        )


class StoreError(CrucibleError, OSError):
    """A node's disk. An OSError child takes its first arguments for errno and filename, so `__reduce__` is ours.

    `node` is the host whose disk it is, where that was known when it was raised.
    """

    def __init__(self, path: str, problem: str = "", node: str = "") -> None:
        super().__init__()
        self.path, self.problem, self.node = path, problem, node

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (type(self), (self.path, self.problem, self.node))

    @property
    def place(self) -> str:
        """The path, and the host that it is on."""
        return f"{self.path} (on {self.node})" if self.node else self.path

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}"


_PLACE = "CRUCIBLE_HOME (or HF_HUB_CACHE, for a file of the Hub cache)"


class DiskFull(StoreError):
    def __str__(self) -> str:
        need = f" ({self.problem})" if self.problem else ""
        return f"{self.place}: no space left on this disk{need}; free some, or set {_PLACE} elsewhere"


class NoRoom(DiskFull):
    """Something was not begun, because it would not fit. Another node may have the room."""

    def __init__(self, path: str, node: str, what: str, need: int, left: int, why: str) -> None:
        """`need` and `left` in bytes; `why` says what bounds the room, and why nothing could go to make more."""
        super().__init__(path, f"{what} needs {need:,} bytes, {left:,} are left", node)
        self.what, self.need, self.left, self.why = what, need, left, why

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (type(self), (self.path, self.node, self.what, self.need, self.left, self.why))

    def __str__(self) -> str:
        return (
            f"{self.place}: no room for {self.what}: it needs {self.need:,} bytes, and {self.left:,} are left "
            f"({self.why}); unpin or evict something (`crucible evict`), raise CRUCIBLE_QUOTA, or add nodes or disk"
        )


class StoreReadOnly(StoreError):
    def __str__(self) -> str:
        return f"{self.place}: cannot be written ({self.problem or 'read-only'}); set {_PLACE} elsewhere"


class StoreVersion(StoreError):
    def __str__(self) -> str:
        return f"{self.place}: {self.problem}; use the crucible that made it, or another CRUCIBLE_HOME"


class ManifestError(CrucibleError):
    def __init__(self, what: str, problem: str) -> None:
        super().__init__(what, problem)
        self.what, self.problem = what, problem

    def __str__(self) -> str:
        return f"manifest {self.what}: {self.problem}"


class StateMismatch(CrucibleError):
    def __init__(self, field: str, expected: str, actual: str) -> None:
        super().__init__(field, expected, actual)
        self.field, self.expected, self.actual = field, expected, actual

    def __str__(self) -> str:
        return (
            f"state_dict has {self.field} {self.actual}, this dataset has {self.expected}; "
            "load it into the dataset it came from"
        )


class BundleError(CrucibleError):
    """A bundle or a lock file that cannot be taken. Nothing of it that was not checked is visible in the store."""

    def __init__(self, bundle: str, member: str, problem: str) -> None:
        super().__init__(bundle, member, problem)
        self.bundle, self.member, self.problem = bundle, member, problem

    def __str__(self) -> str:
        member = f", {self.member}" if self.member else ""
        return f"bundle {self.bundle}{member}: {self.problem}"


class LockMismatch(CrucibleError):
    """A job was to give exactly what a lock file says, and does not."""

    def __init__(self, what: str, locked: str, found: str, hint: str = "") -> None:
        super().__init__(what, locked, found, hint)
        self.what, self.locked, self.found, self.hint = what, locked, found, hint

    def __str__(self) -> str:
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.what}: the lock file says {self.locked}, here it is {self.found}{hint}"


class ClusterError(CrucibleError):
    """Ray, the coordinator or an agent."""


class ClusterUnreachable(ClusterError):
    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"no Ray cluster at {self.address!r}: {self.reason}"


class ClusterRefused(ClusterError):
    """A Ray cluster that asks for a token, and not this process's."""

    def __init__(self, address: str, enabled: bool, found: bool) -> None:
        """`enabled`: this process was told to use a token; `found`: it has one."""
        super().__init__(address, enabled, found)
        self.address, self.enabled, self.found = address, enabled, found

    def __str__(self) -> str:
        copy = "copy the head node's ~/.ray/auth_token to here"
        if self.enabled and self.found:
            return f"the Ray cluster at {self.address!r} does not take the token that is here; {copy}"
        if self.enabled:
            return f"RAY_AUTH_MODE is `token`, and there is none here for the Ray cluster at {self.address!r}; {copy}"
        also = "" if self.found else f" and {copy}"
        return f"the Ray cluster at {self.address!r} wants a token; set RAY_AUTH_MODE=token{also}"


class AgentUnavailable(ClusterError):
    def __init__(self, node: str, reason: str) -> None:
        super().__init__(node, reason)
        self.node, self.reason = node, reason

    def __str__(self) -> str:
        return f"agent of node {self.node}: {self.reason}"


class VersionSkew(ClusterError):
    """Two sides whose versions do not go together. Whatever the one asked, the other did not do."""

    def __init__(self, where: str, what: str, theirs: str, ours: str, todo: str) -> None:
        super().__init__(where, what, theirs, ours, todo)
        self.where, self.what, self.theirs, self.ours, self.todo = where, what, theirs, ours, todo

    def __str__(self) -> str:
        return f"{self.where}: {self.what} {self.theirs}, here it is {self.ours}; {self.todo}"


class PrefetchFailed(ClusterError):
    """The job that was bringing what a reader waits for has failed, or was given up."""

    def __init__(self, job: str, reason: str) -> None:
        super().__init__(job, reason)
        self.job, self.reason = job, reason

    def __str__(self) -> str:
        return f"job {self.job}, which was bringing these rows, failed: {self.reason} (start it again, or this reader)"


class StaleCoordinator(ClusterError):
    """A coordinator that another one has taken over from: nobody does what it says any more, and it stops."""

    def __init__(self, who: str, epoch: int, newest: int) -> None:
        super().__init__(who, epoch, newest)
        self.who, self.epoch, self.newest = who, epoch, newest

    def __str__(self) -> str:
        return (
            f"{self.who} refused the coordinator of epoch {self.epoch}: that of epoch {self.newest} has taken over, "
            "and goes on with its jobs; ask that one (`crucible jobs`)"
        )


class JobUnknown(ClusterError):
    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"job {self.job}: this cluster's coordinator does not know it; start it again: what is done counts"


class TokenForgotten(ClusterError):
    """A job that was gone on with after its coordinator died cannot get what the driver's token was needed for."""

    def __init__(self, job: str, reason: str) -> None:
        super().__init__(job, reason)
        self.job, self.reason = job, reason

    def __str__(self) -> str:
        return (
            f"job {self.job} went on under a new coordinator, without the token that its driver had given: a token is "
            f"kept in memory only. {self.reason}. Start it again with HF_TOKEN set, or set it on the nodes"
        )
