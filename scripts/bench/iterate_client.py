"""One measurement of a loader in a process of its own.

    iterate_client.py '{"do": "prepare", "library": "litdata", "work": "t", "folder": "…"}'
    iterate_client.py '{"do": "read", "library": "crucible", "work": "t", "case": "rows", "folder": "…", "seconds": 5}'
    iterate_client.py '{"do": "resume", "library": "crucible", "work": "t", "folder": "…", "done": 1000}'

Prints one line of JSON. `rows_per_s` is after imports and opening, from the first row on, for at most `seconds`;
`anon_mb` the most memory that is no mapped file, of this process and its children together.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.readers import LIBRARIES, home

LOOK_S = 0.1


def anon_mb() -> float:
    """RssAnon of this process and its children."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    total = 0
    for pid in (str(me), *children):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return total / 1024


def read(library: Any, spec: dict[str, Any]) -> dict[str, Any]:
    items, rows_of = library.cases[spec["case"]](library)
    rows, most = 0, 0.0
    start = time.perf_counter()
    cpu = time.process_time()
    first = last = look = 0.0
    for item in items:
        rows += rows_of(item)
        last = time.perf_counter() - start
        if not first:
            first = last
        if last > look:
            most, look = max(most, anon_mb()), last + LOOK_S
            if last > spec["seconds"]:
                break
    return {
        "rows": rows,
        "rows_per_s": rows / last,
        "first_ms": first * 1e3,
        "cpu_us_a_row": (time.process_time() - cpu) / rows * 1e6,
        "anon_mb": max(most, anon_mb()),
    }


def resume(library: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """From a loaded state to the next row of a shuffled epoch."""
    again, wanted = library.resumed(spec["done"])
    start = time.perf_counter()
    found = again()
    return {"resume_ms": (time.perf_counter() - start) * 1e3, "exact": found == wanted}


def main(spec: dict[str, Any]) -> None:
    root = Path(spec["folder"])
    home(root)
    folder = root / f"{spec['library']}-{spec['work']}"
    folder.mkdir(parents=True, exist_ok=True)
    library = LIBRARIES[spec["library"]](folder, spec["work"])
    if spec["do"] == "prepare":
        library.prepare(sorted((root / spec["work"] / "data").glob("*.parquet")))
        print("{}")
        return
    print(json.dumps(read(library, spec) if spec["do"] == "read" else resume(library, spec)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
