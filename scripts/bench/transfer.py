"""Bytes from a Hub or a peer to this disk: ours beside the official client and beside curl.

Example: python scripts/bench/transfer.py --rounds 5
         python scripts/bench/transfer.py --full --work one-big,peer --link loopback --json > rows.json

Everything runs on this machine: our own Hub in a process of its own with its pages in the page cache, each client in
a fresh process with a fresh home, the methods interleaved round by round so that a busy neighbour slows them alike.
Files are written to a disk cache whose pages were just in use.
Printed are medians of the time without interpreter start and imports, all times, and ratios; quote ratios. Every
method's bytes are checked against their sha256 after its clock has stopped.

--work   one-big (1 LFS file), few-big (4), many-small (regular files), many-lfs (small LFS files), peer (a shard from a
         node's agent)
--link   loopback, and delayed: --rtt-ms of latency by netem in a network namespace of its own, or where that cannot be
         had by a relay in user space that bounds what a connection has under way; the output says which it was
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench.links import Link, Processes, Server, delayed, ended_by_signals, loopback
from scripts.bench.methods import CURL, HTTPX, OFFICIAL, OURS, Method, Outcome, Place, methods
from scripts.bench.works import FULL, MB, QUICK, Sizes, Work, makers


@dataclass
class Row:
    """All runs of one method on one work over one link."""

    link: str
    work: Work
    method: str
    runs: list[Outcome] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    server_cpu_s: list[float] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return statistics.median(run.wall_s for run in self.runs)

    def record(self, others: Sequence[Row]) -> dict[str, Any]:
        """The row for a machine, with how many times faster it is than the official client's best, curl and httpx."""
        beside = {row.method: row for row in others if (row.link, row.work) == (self.link, self.work)}
        best = min((beside[name].wall_s for name in OFFICIAL if name in beside), default=None)
        walls = {"official": best}
        walls |= {
            word: beside[name].wall_s if name in beside else None for word, name in (("curl", CURL), ("httpx", HTTPX))
        }
        return {
            "link": self.link,
            "work": self.work.name,
            "method": self.method,
            "files": len(self.work.files),
            "bytes": self.work.size,
            "wall_s": round(self.wall_s, 4),
            "walls_s": [round(run.wall_s, 4) for run in self.runs],
            "mb_per_s": round(self.work.size / MB / self.wall_s, 1),
            "files_per_s": round(len(self.work.files) / self.wall_s, 1),
            "process_s": round(statistics.median(run.process_s for run in self.runs), 4),
            "cpu_s": round(statistics.median(run.cpu_s for run in self.runs), 3),
            "server_cpu_s": round(statistics.median(self.server_cpu_s), 3),
            "requests": round(statistics.median(self.requests)) if self.requests else None,
            "peak_mb": max((run.peak_mb for run in self.runs if run.peak_mb is not None), default=None),
            **{f"times_{word}": round(wall / self.wall_s, 2) if wall else None for word, wall in walls.items()},
        }


def run_once(row: Row, method: Method, place: Place, server: Server) -> None:
    """One run: a fresh folder, the method, the check, and a disk that is quiet again for the next."""
    place.folder.mkdir()
    warm(place.folder / "warm", row.work.size + 8192 * len(row.work.files))
    server.since()
    try:
        outcome = method(place)
        said = server.since()
        row.work.check(outcome.files)
    finally:
        if row.work.kind == "small":  # removed at the very end: ext4 lets who makes files pay for those just removed
            place.folder.rename(tempfile.mkdtemp(prefix="old-", dir=place.folder.parent))
        else:
            shutil.rmtree(place.folder, ignore_errors=True)
        os.sync()
    if place.profile is not None:
        return
    row.runs.append(outcome)
    row.server_cpu_s.append(said["cpu_s"])
    requests = outcome.requests if said["requests"] is None else said["requests"]
    if requests is not None:
        row.requests.append(requests)


def warm(path: Path, size: int) -> None:
    """Have the kernel's free list begin with pages that the machine really has.

    A virtual machine that gives free memory back to its host gets it again page by page, at a tenth of a disk cache's
    speed, and which run pays for that would be chance.
    """
    block = bytes(1 << 20)
    with path.open("wb", buffering=0) as file:
        for _ in range(0, size, len(block)):
            file.write(block)
    path.unlink()


def measure(work: Work, link: Link, options: argparse.Namespace, scratch: Path, processes: Processes) -> list[Row]:
    ways = methods(work.kind, far=link.name != "loopback")
    names = [name for name in ways if any(part in name for part in options.only.split(","))]
    rows = [Row(link.name, work, name) for name in names]
    with link.open(dict(work.server)) as server:
        for number in range(options.rounds):
            for row in rows:
                say(options, f"{link.name} {work.name} round {number + 1}: {row.method}")
                run_once(row, ways[row.method], Place(work, server, scratch / "run", processes), server)
        for row in rows if options.profile else ():
            if row.method.startswith(OURS):
                name = "-".join((link.name, work.name, row.method)).replace(" ", "-").replace(",", "")
                path = options.profile / f"{name}.txt"
                run_once(row, ways[row.method], Place(work, server, scratch / "run", processes, path), server)
                say(options, f"profile of {row.method}: {path}")
    return rows


def say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the figures were taken on, in words."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    names = ("huggingface_hub", "httpx", "aiohttp", "urllib3")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
        "sha256_mb_per_s": sha256_speed(),
        "versions": {name: version(name) for name in names},
        "load_1_min": round(os.getloadavg()[0], 1),
    }


def sha256_speed() -> int:
    """MB/s of one core, the best of five: no file can be verified faster, whatever brings it."""
    block, best = bytes(1 << 20), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(64):
            hashlib.sha256(block)
        best = min(best, time.perf_counter() - started)
    return round(64 * len(block) / MB / best)


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown, a table for each work over each link."""
    heads = (
        "method",
        "median s",
        "MB/s",
        "files/s",
        "x official",
        "x curl",
        "CPU s",
        "server CPU s",
        "requests",
        "peak MB",
        "all s",
    )
    seen = None
    for record in records:
        if seen != (record["link"], record["work"]):
            seen = (record["link"], record["work"])
            yield f"\n{record['work']}, {record['link']}: {record['files']:,} files, {record['bytes'] / MB:,.0f} MB\n"
            yield "| " + " | ".join(heads) + " |"
            yield "|---" * len(heads) + "|"
        keys = (
            "method",
            "wall_s",
            "mb_per_s",
            "files_per_s",
            "times_official",
            "times_curl",
            "cpu_s",
            "server_cpu_s",
            "requests",
            "peak_mb",
        )
        cells = ["" if record[key] is None else str(record[key]) for key in keys]
        yield "| " + " | ".join([*cells, " ".join(f"{wall:g}" for wall in record["walls_s"])]) + " |"


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[str]:
    """A folder that is gone afterwards, also when what was just killed in it has still made a file meanwhile."""
    folder = tempfile.mkdtemp(prefix="crucible-bench-", dir=parent)
    try:
        yield folder
    finally:
        for _ in range(50):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = list(makers(QUICK))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="989 MB, 4 x 256 MB, 10,000 x 2 KB, 2,000 x 20 KB, 512 MB")
    parser.add_argument("--work", default=",".join(names), help="comma list (default all)")
    parser.add_argument("--link", default="loopback,delayed", help="comma list (default both)")
    parser.add_argument("--only", default="", help="methods whose name contains one of these, comma list")
    parser.add_argument("--big-mb", type=float, help="size of the one big file, and of the few together")
    parser.add_argument("--small-files", type=int, help="how many regular files; LFS files are a fifth of them")
    parser.add_argument("--peer-mb", type=float, help="size of the shard")
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--window", type=int, default=4 << 20, help="bytes under way in a connection of the relay")
    parser.add_argument("--scratch", type=Path, help="where to write; default is the temporary folder")
    parser.add_argument("--profile", type=Path, help="also run ours under a profiler; texts go to this folder")
    parser.add_argument("--json", action="store_true", help="a line for the machine, then a line for each row")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(argv)
    options.work, options.link = options.work.split(","), options.link.split(",")
    unknown = {*options.work} - {*names} | {*options.link} - {"loopback", "delayed"}
    if unknown or options.rounds < 1:
        parser.error(f"no such work or link: {', '.join(sorted(unknown))}" if unknown else "--rounds is at least 1")
    return options


def sizes(options: argparse.Namespace) -> Sizes:
    made = FULL if options.full else QUICK
    if options.big_mb:
        made = replace(made, one=int(options.big_mb * MB), few=(int(options.big_mb * MB / 4),) * 4)
    if options.small_files:
        lfs = (max(1, options.small_files // 5), made.lfs[1])
        made = replace(made, regular=(options.small_files, made.regular[1]), lfs=lfs)
    return replace(made, shard=int(options.peer_mb * MB)) if options.peer_mb else made


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    make = makers(sizes(options))
    if options.profile:
        options.profile.mkdir(parents=True, exist_ok=True)
    with (
        ended_by_signals(),
        scratch_folder(options.scratch) as scratch,
        Processes() as processes,
        delayed(processes, options.rtt_ms, options.window) as slow,
    ):
        links = {"loopback": loopback(processes), "delayed": slow}
        about = {"machine": machine(), "links": {links[name].name: links[name].how for name in options.link}}
        print(json.dumps(about) if options.json else f"{about['machine']}\n{about['links']}", flush=True)
        for name in options.work:
            say(options, f"making {name}")
            folder = Path(scratch, name)
            folder.mkdir()
            work = make[name](folder)
            os.sync()
            for link in options.link:
                rows = measure(work, links[link], options, Path(scratch), processes)
                records = [row.record(rows) for row in rows]
                lines = map(json.dumps, records) if options.json else table(records)
                print("\n".join(lines), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
