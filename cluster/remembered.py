"""A job as the journal has it, and back: what was asked, how far it is, how it ended. Pure.

The value of a `job/<name>` cell. `crucible jobs` shows a part of it. It has no token: `token` says only that the driver
gave one, and where it is needed after a restart the node must have its own, or the driver give it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from crucible import errors
from crucible.cluster.journal import ENDED, Value
from crucible.config import Settings
from crucible.errors import ClusterError, CrucibleError
from crucible.refs import DataRequest, NodeId
from crucible.report import Counts, JobReport, Progress, SplitReport
from crucible.workers.asking import request_from_json
from crucible.workers.fencing import Epoch
from crucible.workers.tasks import JobOptions

SHOWN = (
    "job",
    "repo",
    "config",
    "split",
    "phase",
    "commit",
    "epoch",
    "started",
    "ended",
    "items_done",
    "items",
    "bytes_done",
    "bytes",
    "replicas",
    "error",
)
"""Of a job's value, what a person is shown."""


def accepted(
    request: DataRequest,
    options: JobOptions,
    replicas: int,
    nodes: int | None,
    *,
    token: bool,
    epoch: Epoch,
    embedded: bool,
    now: float,
) -> dict[str, Any]:
    """A job that was asked for just `now` (seconds since 1970, for people to read)."""
    told = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "epoch"}
    return {
        "request": asdict(request),
        "options": told,
        "replicas": replicas,
        "nodes": nodes,
        "token": token,
        "cluster": epoch.cluster,
        "embedded": embedded,
        "epoch": epoch.number,
        "phase": "resolve",
        "commit": "",
        "started": now,
        "ended": None,
        "items": 0,
        "items_done": 0,
        "bytes": 0,
        "bytes_done": 0,
        "error": None,
        "report": None,
    }


def with_progress(value: Value, progress: Progress) -> dict[str, Any]:
    """The job as far as it is now."""
    done = {name: getattr(progress, name) for name in ("phase", "items", "items_done", "bytes", "bytes_done")}
    return {**value, **done}


def with_end(
    value: Value, phase: str, now: float, report: JobReport | None, error: CrucibleError | None
) -> dict[str, Any]:
    """The job with what its driver will be told."""
    ended = {**value, "phase": phase, "ended": now, "report": None if report is None else asdict(report)}
    if error is not None:
        ended["error"] = {"type": type(error).__name__, "args": _plain(error), "text": str(error)}
    return ended


def must_go_on(value: Value, cluster: str) -> bool:
    """True for a job that has not ended; one of an embedded cluster ended with the process that had it."""
    return value["phase"] not in ENDED and (not value["embedded"] or value["cluster"] == cluster)


def request_of(value: Value) -> DataRequest:
    """Raises KeyError or TypeError for what another version wrote."""
    return request_from_json(value["request"])


def options_of(value: Value, settings: Settings) -> JobOptions:
    """The job's options; what the journal does not know is as this node has it."""
    known = {field.name for field in fields(JobOptions)} - {"epoch"}
    told = {name: _tuples(one) for name, one in value["options"].items() if name in known}
    return replace(JobOptions.of(settings), **told)


def report_of(value: Value) -> JobReport | None:
    """The report of a finished job, where it is still remembered."""
    raw = value.get("report")
    if not raw:
        return None
    try:
        return JobReport(
            **{
                **{name: _tuples(one) for name, one in raw.items()},
                "splits": tuple(SplitReport(**split) for split in raw["splits"]),
                "counts": Counts(**raw["counts"]),
                "nodes": tuple((NodeId(node), int(shards), int(size)) for node, shards, size in raw["nodes"]),
            }
        )
    except (KeyError, TypeError, ValueError):
        return None


def error_of(value: Value) -> CrucibleError | None:
    """The error that a job ended with, of its own type where it is one of ours."""
    raw = value.get("error")
    if not raw:
        return None
    kind = getattr(errors, str(raw["type"]), None)
    if isinstance(kind, type) and issubclass(kind, CrucibleError) and raw["args"] is not None:
        try:
            return kind(*(_tuples(one) for one in raw["args"]))
        except TypeError:
            pass
    return ClusterError(str(raw["text"]))


def progress_of(name: str, value: Value) -> Progress:
    """How far a job was, when it was last noted."""
    done, items, got, size = (int(value[key]) for key in ("items_done", "items", "bytes_done", "bytes"))
    return Progress(name, value["phase"], done, items, got, size)


def shown(name: str, value: Value) -> dict[str, Any]:
    """What `crucible jobs` says of a job: plain values, the same keys for each."""
    request: Mapping[str, Any] = value["request"]
    error: Mapping[str, Any] | None = value["error"]
    told = {
        "job": name,
        "repo": request["repo"]["repo_id"],
        "config": request["config"],
        "split": request["split"],
        "error": error["text"] if error else "",
    }
    return {key: told[key] if key in told else value[key] for key in SHOWN}


def _plain(error: CrucibleError) -> list[Any] | None:
    """The constructor's arguments, if JSON can carry them."""
    reduced = error.__reduce__()  # a StoreError has its own
    arguments = reduced[1] if isinstance(reduced, tuple) else (None, object())
    return list(arguments) if all(map(_carried, arguments)) else None


def _carried(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_carried, value))
    return value is None or isinstance(value, (str, int, float, bool))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
