"""A server of the benchmark in a process of its own: our Hub over a folder, or a node's agent over a store.

    servers.py '{"kind": "hub", "root": "...", "host": "127.0.0.1", "public": ["http://...", "http://..."]}'
    servers.py '{"kind": "agent", "root": "...", "host": "127.0.0.1", "secret": "..."}'

Prints one line of JSON with its origins, and then one for every line that comes in: the requests that ended since the
last, and the CPU seconds that this process spent on them. Ends with its standard input, so never outlives who
started it.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NO_QUOTA = 10**9


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(spec: dict[str, Any]) -> None:
    with ExitStack() as stack:
        hub = None
        if spec["kind"] == "hub":
            from crucible.hub.server import HubOptions, HubServer, RateLimits

            public = spec.get("public") or ("", "")
            limits = RateLimits(api=NO_QUOTA, resolvers=NO_QUOTA, pages=NO_QUOTA)
            options = HubOptions(limits=limits, log_keep=10**6, public_url=public[0], public_cdn_url=public[1])
            hub = stack.enter_context(HubServer(spec["root"], host=spec["host"], options=options))
            origins = [hub.endpoint, hub.cdn_endpoint]
        else:
            from crucible.cache.store import Store
            from crucible.refs import NodeId
            from crucible.workers.serve import AgentServer

            agent = AgentServer(
                Store(Path(spec["root"])), spec["secret"], NodeId("bench"), spec["host"], 0, lambda _: []
            )
            stack.callback(agent.close)
            origins = [agent.url]
        print(json.dumps({"origins": origins}), flush=True)
        before = cpu_s()
        for _ in sys.stdin:
            said: dict[str, Any] = {"requests": None, "cpu_s": round(cpu_s() - before, 3)}
            if hub is not None:
                said["requests"] = len(hub.log)
                hub.clear_log()
            before = cpu_s()
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
