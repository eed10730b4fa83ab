"""What an agent does when its process is told to end: it sees its node drained first, inside a grace period.

A SIGTERM reaches the agent alone where somebody sends it just that, or before the rest of the node is ended (a preStop
hook does as well with `crucible drain --self`). It goes on serving meanwhile, copies of what only it holds are made
elsewhere, last copies first, and what could not be saved is said in the log. A second SIGTERM ends it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ray as untyped_ray

from crucible.errors import CrucibleError
from crucible.refs import NodeId
from crucible.workers.tasks import coordinator

ray: Any = untyped_ray  # its annotations know neither `exceptions` nor what a remote call returns
log = logging.getLogger("crucible.agent")

ASK_S = 5.0
POLL_S = 0.5


def drain_on_sigterm(node: NodeId, grace_s: float, others: Callable[[], bool]) -> None:
    """From now on a SIGTERM drains the node first. `others` says whether there is anybody to take anything.

    Does nothing outside of the main thread, where no signal arrives.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL  # None: not Python's

    def leave(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        if others():
            threading.Thread(target=_drain_and_go, args=(node, grace_s), name="crucible-leave", daemon=True).start()
        elif callable(before):
            before(number, frame)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def _drain_and_go(node: NodeId, grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    try:
        _drain(node, grace_s, deadline)
    except (ray.exceptions.RayError, CrucibleError) as error:
        log.warning("node %s ends without being drained: %s", node[:12], str(error).splitlines()[0])
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _drain(node: NodeId, grace_s: float, deadline: float) -> None:
    there = coordinator()
    told = ray.get(there.care.remote("start_drain", [node], grace_s), timeout=min(grace_s, ASK_S))
    while told["phase"] not in ("done", "cancelled", "failed") and time.monotonic() < deadline:
        told = ray.get(there.care.remote("operation", told["operation"], POLL_S), timeout=ASK_S)
    if told["left"] or told["phase"] != "done":
        log.warning(
            "node %s ends with shards that nobody else holds: %s left (%s of %s copies made in %.0f s)",
            *(node[:12], told["left"] or "some", told["copied"], told["copies"], grace_s),
        )
