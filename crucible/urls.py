"""Addresses of files on the Hub as people write them: `hf://datasets/...` and the web's `.../resolve/...`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote

from crucible.errors import UsageError

_HF = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?/(?P<path>.+)"
)
_WEB = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/datasets/(?P<repo>[^/]+/[^/]+)/(?:resolve|raw|blob)/"
    r"(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+)/(?P<path>[^?#]+)"
)


class HubPlace(NamedTuple):
    """A file or pattern in a dataset repo. `revision` None is the one that a request asks for."""

    repo: str
    revision: str | None
    path: str


def hub_place(address: str) -> HubPlace | None:
    """Where an address leads; None for what is no address of a file in a dataset repo."""
    for form, quoted in ((_HF, False), (_WEB, True)):
        if match := form.fullmatch(address.partition("?")[0] if quoted else address):
            revision, path = match["revision"], match["path"]
            return HubPlace(match["repo"], revision and unquote(revision), unquote(path) if quoted else path)
    return None


def one_repo(addresses: Iterable[str], revision: str | None) -> tuple[str, str | None] | None:
    """The repo and revision that all these lead to; None if the first is no address of the Hub.

    Raises UsageError where others lead elsewhere, or to another revision.
    """
    listed = list(addresses)
    if not listed or hub_place(listed[0]) is None:
        return None
    found = dict.fromkeys(
        None if (place := hub_place(one)) is None else (place.repo, place.revision or revision or "main")
        for one in listed
    )
    if len(found) > 1 or None in found:
        raise UsageError(
            f"data_files lead to several places ({listed[0]!r}, …): one call reads one repo at one revision; load "
            "each, and join them with concatenate_datasets"
        )
    repo, said = next(one for one in found if one is not None)
    if revision not in (None, said):
        raise UsageError(f"revision is {revision!r}, but {listed[0]!r} names {said!r}")
    return repo, said
