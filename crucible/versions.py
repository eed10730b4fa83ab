"""What a process says of itself to another one, so that two that do not go together find out before they work together.

Pure, but for looking at what is installed. `cluster.skew` judges.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from crucible.errors import VersionSkew
from crucible.refs import CONVERSION_VERSION

PROTOCOL = 1
"""Raise it whenever a coordinator, an agent, a task or a reader of the version before would misunderstand this one."""

HEADER = "x-crucible-protocol"
"""In every reply of an agent."""


@dataclass(frozen=True, slots=True)
class Versions:
    """One process's versions. Empty text or 0 is what was not told."""

    crucible: str = ""
    protocol: int = 0
    conversion: int = 0
    """`CONVERSION_VERSION`."""
    pyarrow: str = ""
    python: str = ""
    ray: str = ""

    def told(self) -> dict[str, Any]:
        """As it crosses a process boundary: plain, so that another version can read it."""
        return asdict(self)

    @staticmethod
    def heard(told: Mapping[str, Any]) -> Versions:
        """From what another process told, whose version may know more names than this one, or fewer."""
        known: dict[str, type] = {field.name: type(field.default) for field in fields(Versions)}
        given: dict[str, Any] = {name: value for name, value in told.items() if type(value) is known.get(name)}
        return Versions(**given)


def versions_here() -> Versions:
    """This process's. Imports none of the packages."""
    return Versions(
        crucible=installed("crucible-data"),
        protocol=PROTOCOL,
        conversion=CONVERSION_VERSION,
        pyarrow=installed("pyarrow"),
        python=platform.python_version(),
        ray=installed("ray"),
    )


def installed(package: str) -> str:
    """The version of an installed package; empty where there is no record of it."""
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on PYTHONPATH, or Ray's working_dir
        return ""


def check_conversion(conversion: int, where: str) -> None:
    """Raise VersionSkew unless the other side converts as this process does."""
    if conversion != CONVERSION_VERSION:
        raise VersionSkew(
            where,
            "wants shards of conversion",
            str(conversion),
            str(CONVERSION_VERSION),
            f"install the same crucible on all nodes (here it is {installed('crucible-data') or 'a checkout'})",
        )


def check_reply(headers: Mapping[str, str], where: str) -> None:
    """Raise VersionSkew if the agent at `where` says in its reply that it speaks another protocol than ours."""
    said = headers.get(HEADER, "")
    if said and said != str(PROTOCOL):
        raise VersionSkew(
            f"the agent at {where}",
            "speaks protocol",
            said[:20],
            str(PROTOCOL),
            "install the same crucible on all nodes, and prefetch again to start its agent anew",
        )
