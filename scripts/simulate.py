"""Run the product's own mind in virtual time: a cluster of any size, a seed, and everything that can go wrong.

Example: python scripts/simulate.py --seeds 1000               # small clusters, a little of everything
         python scripts/simulate.py --scenario straggler       # one named cluster, with its figures
         python scripts/simulate.py --scenario thousand --json # 1,024 nodes and 1,000,000 shards: some minutes
         python scripts/simulate.py --seed 17 --trace          # one seed again, with the end of its events

What is real: placement, waiting, tracking and copying (`cluster.track` and what it stands on), the catalog, the planner
of repairs, and the ledger that governs requests to the Hub. What is modelled: nodes, links, disks, the Hub, and the
loop that performs commands. Scenarios: drawn (by the seed), quiet, straggler, limited, losses, thousand.

A seed that breaks an invariant prints the end of its events and the command that runs it again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.simulation.broken import Broken
from scripts.simulation.outcome import figures, run
from scripts.simulation.planted import PLANTED
from scripts.simulation.scenario import NAMED, Scenario, told, with_numbers

TAIL = 25


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scenario", choices=sorted(NAMED), default="drawn")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many, one after the other")
    parser.add_argument("--nodes", type=int, help="in place of the scenario's own number")
    parser.add_argument("--shards", type=int, help="in place of the scenario's own number")
    parser.add_argument("--replicas", type=int, help="in place of the scenario's own number")
    parser.add_argument(
        "--planted", choices=sorted(PLANTED), help="a mind that is broken on purpose: it has to be caught"
    )
    parser.add_argument("--trace", action="store_true", help="print the last events of every run")
    parser.add_argument("--json", action="store_true", help="one object a run")
    given = parser.parse_args(arguments)
    began, broken, rows = time.process_time(), 0, []
    for seed in range(given.seed, given.seed + given.seeds):
        scenario = NAMED[given.scenario](seed)
        scenario = with_numbers(scenario, nodes=given.nodes, items=given.shards, replicas=given.replicas)
        try:
            world = run(scenario, given.planted)
        except Broken as error:
            broken += 1
            print(_named(error, scenario, given), file=sys.stderr)
            continue
        row = figures(scenario, world)
        rows.append(row)
        if given.json:
            print(json.dumps(row), flush=True)
        elif given.seeds == 1:
            print(_table(row))
        if given.trace:
            print("\n".join(world.trace), file=sys.stderr)
    if given.seeds > 1 and not given.json:
        print(_summary(rows, broken, time.process_time() - began))
    return 1 if broken else 0


def _named(error: Broken, scenario: Scenario, given: argparse.Namespace) -> str:
    """What a person needs: what broke, after what, and how to see it again."""
    again = ["python scripts/simulate.py --seed", str(scenario.seed), "--scenario", given.scenario]
    for name in ("nodes", "shards", "replicas", "planted"):
        if getattr(given, name) is not None:
            again += [f"--{name}", str(getattr(given, name))]
    lines = [f"seed {scenario.seed} breaks {error}", f"  {told(scenario)}", "the last events:"]
    return "\n".join([*lines, *error.trace[-TAIL:], f"again: {' '.join(again)}"])


def _table(row: dict[str, Any]) -> str:
    return "\n".join(
        f"{name:24} {value:,}" if isinstance(value, (int, float)) else f"{name:24} {value}"
        for name, value in row.items()
    )


def _summary(rows: list[dict[str, Any]], broken: int, seconds: float) -> str:
    ratios = sorted(row["makespan_over_bound"] or 0.0 for row in rows if row["ended"] == "finished")
    middle = ratios[len(ratios) // 2] if ratios else 0.0
    failed = sum(row["ended"] == "failed" for row in rows)
    tries, items = sum(row["tries"] for row in rows), sum(row["shards"] for row in rows)
    return (
        f"{len(rows) + broken} seeds in {seconds:.1f} s of CPU: {broken} broken, {failed} jobs failed as they had to; "
        f"{tries:,} tries of {items:,} items, {sum(row['copies'] for row in rows):,} copies, "
        f"{sum(row['repairs'] for row in rows):,} repairs; makespan over its lower bound {middle:.2f} in the middle"
    )


if __name__ == "__main__":
    raise SystemExit(main())
