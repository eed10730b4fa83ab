"""Which repo ids, ref names and file paths this Hub accepts. No I/O.

Names become paths on the server's disk, so everything here is an allow-list.
"""

from __future__ import annotations

import re

from crucible.errors import UnsafePath, UsageError
from crucible.refs import RepoType, safe_repo_path

REPO_TYPES: tuple[RepoType, ...] = ("model", "dataset", "space")

_REF = re.compile(r"[\w.-]+(/[\w.-]+)*")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_ref(ref: str) -> bool:
    """A ref name that is also a safe relative path below `refs/`."""
    return (
        len(ref) <= 200
        and _REF.fullmatch(ref) is not None
        and not any(part.startswith(".") or part.endswith((".", ".lock")) or ".." in part for part in ref.split("/"))
    )


def full_ref(branch: str) -> str:
    """`main` is `refs/heads/main`; a name that already begins with `refs/` stays. Raises UsageError."""
    ref = branch if branch.startswith("refs/") else f"refs/heads/{branch}"
    if not is_ref(ref) or COMMIT.fullmatch(branch):
        raise UsageError(f"{branch!r} is no usable branch name")
    return ref


def check_path(repo_id: str, path: str) -> str:
    """A file path of a repo: relative, `/`-separated, printable, never leaving its folder. Raises UnsafePath."""
    parts = path.split("/")
    if ".git" in parts or any(ord(char) < 32 or char == "\x7f" for char in path):
        raise UnsafePath(repo_id, path)
    return safe_repo_path(repo_id, path)
