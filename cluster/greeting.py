"""Ask an agent who it is, of whatever version it may be; and what this process makes of the sample to compare with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import ray as untyped_ray

from crucible.cluster.skew import Clock, Verdict, check_coordinator, judge
from crucible.versions import Versions, versions_here

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns

SAMPLE_WAIT_S = 60.0
"""For an agent to convert the sample."""


def hello(agent: Any) -> Any:
    """Ask an agent who it is; None where it is of a version that cannot say."""
    ask = getattr(agent, "hello", None)
    return None if ask is None else ask.remote()


def heard(reply: Any, wait_s: float) -> Mapping[str, Any]:
    """What it said; nothing from one that cannot say. Raises a RayError."""
    try:
        told = {} if reply is None else ray.get(reply, timeout=wait_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AttributeError):
            return {}
        raise
    return told if isinstance(told, Mapping) else {}


def check_versions(coordinator: Any, wait_s: float) -> None:
    """Raise VersionSkew if this process does not understand that coordinator. Raises a RayError."""
    check_coordinator(Versions.heard(heard(hello(coordinator), wait_s)))


def judged(agent: Any, told: Mapping[str, Any], clock: Clock) -> Verdict:
    """What an agent that told this may do. One that writes with another pyarrow is asked for the sample as well."""
    mine, theirs = versions_here(), Versions.heard(told)
    problem = str(told.get("store_problem", ""))
    verdict = judge(mine, theirs, clock=clock, store_problem=problem)
    if verdict.works or verdict.refused is not None:
        return verdict
    same = False
    with suppress(ray.exceptions.RayError):  # a pyarrow that cannot even read the sample
        same = ray.get(agent.sample.remote(), timeout=SAMPLE_WAIT_S) == own_sample()
    return judge(mine, theirs, clock=clock, same_bytes=same)


@cache
def own_sample() -> str:
    """What this process makes of the sample that nodes with another pyarrow are asked to convert."""
    from crucible.workers.sample import sample_digest

    with tempfile.TemporaryDirectory() as folder:
        return sample_digest(Path(folder))
