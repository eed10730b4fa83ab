"""Ask this node's agent about the cluster: what a reader may begin with, what became of a shard, what there is in all.

A training process is no Ray worker, and a shell need not be one to look: the agent is, and passes questions on to the
coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import httpx

from crucible.cache.store import Store
from crucible.config import Settings
from crucible.refs import DataRequest, RepoRef
from crucible.workers.secret import load_secret
from crucible.workers.serve import read_address
from crucible.workers.tls import Trust, answer_of

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 15.0
"""The agent itself gives the coordinator ten seconds."""
FIGURES_TIMEOUT_S = 5.0
"""For a table, which the coordinator has in well under a second: an agent that hangs is passed by, and Ray is asked."""
ROOM_TIMEOUT_S = 60.0
"""For an agent that asks sources and other nodes what may go."""


class Line:
    """A reader's line to the agent of its node. Any method from any thread; a process makes its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = Store(settings.home)

    def opening(self, request: DataRequest) -> dict[str, Any] | None:
        """What a running or finished job has of `request` (`cluster.readers`); None when nobody answers."""
        return self._ask("opening", {"request": asdict(request), "endpoint": self._settings.endpoint})

    def wish(self, job: str, keys: Sequence[str]) -> dict[str, Any] | None:
        """Say that the items `keys` are needed, in this order, and hear what is made of them. None: nobody answers."""
        return self._ask("wishes", {"job": job, "keys": list(keys)})

    def room(self, need: int, since: float | None) -> int | None:
        """Have this node's agent free `need` bytes of this store; those that it freed, None: nobody answers.

        `since`: shards used then or later stay.
        """
        told = self._ask("room", {"need": need, "since": since, "home": str(self._settings.home)}, ROOM_TIMEOUT_S)
        return int(told["freed"]) if told is not None and isinstance(told.get("freed"), int) else None

    def figures(self, what: str, *arguments: Any) -> Any:
        """A table of the cluster that this node is in, as its coordinator has it; None: nobody answers."""
        told = self._ask("figures", {"what": what, "arguments": list(arguments)}, FIGURES_TIMEOUT_S)
        return None if told is None else told.get("answer")

    def _ask(
        self, what: str, question: Mapping[str, Any], timeout_s: float = ANSWER_TIMEOUT_S
    ) -> dict[str, Any] | None:
        secret = load_secret(self._store)
        address = read_address(self._store)
        agent = self._settings.agent_url or (address.url if address else None)
        if secret is None or agent is None:
            return None
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        try:
            client = Trust.of(self._settings, self._store).client(agent)
            url = f"{agent.rstrip('/')}/v1/{what}"
            found = answer_of(client, "POST", url, secret=secret, timeout=timeout, question=question)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError):
            return None
        return found if isinstance(found, dict) else None


def request_from_json(raw: Mapping[str, Any]) -> DataRequest:
    """The request that `asdict` took apart and JSON carried. Raises TypeError or KeyError for anything else."""
    named = {name: _tuples(value) for name, value in raw.items() if name != "repo"}
    return DataRequest(repo=RepoRef(**raw["repo"]), **named)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
