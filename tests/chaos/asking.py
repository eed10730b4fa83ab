"""What the suite asks of the product from outside: a prefetch in the background, and an admin's commands."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import crucible
from crucible.errors import ClusterError, CrucibleError
from crucible.report import Progress

ANSWER_S = 100


def care(what: str, *arguments: Any, **named: Any) -> Any:
    """What `crucible nodes`, `drain`, `verify` and the like ask of the coordinator."""
    import ray

    from crucible.cluster.coordinator import reach_coordinator

    try:
        return ray.get(reach_coordinator(embedded=False).care.remote(what, *arguments, **named), timeout=ANSWER_S)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{what}: {type(error).__name__}") from error


def undrain(node: str) -> None:
    """The node may have died, and its order with it."""
    with suppress(CrucibleError):
        care("undrain", [node])


class Job:
    """A prefetch in a thread of its own, which nobody waits for at the end of the process."""

    def __init__(self, repo: str, address: str, replicas: int) -> None:
        self.seen: list[Progress] = []
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(repo, address, replicas), daemon=True)
        self._thread.start()

    def _run(self, repo: str, address: str, replicas: int) -> None:
        try:
            crucible.prefetch(repo, split="train", address=address, replicas=replicas, on_progress=self.seen.append)
        except BaseException as error:
            self._problem = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def problem(self) -> BaseException | None:
        """What it failed with, once it has ended."""
        return self._problem
