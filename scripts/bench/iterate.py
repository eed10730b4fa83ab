"""Rows per second of the loader beside `datasets`, MosaicML Streaming, LitData and WebDataset.

Example: python scripts/bench/iterate.py
         python scripts/bench/iterate.py --full --rounds 5 --peers ../peers/bin/python --json > rows.json

MosaicML Streaming cannot be installed beside `datasets` 5.2, so its interpreter, with LitData and WebDataset, is a
virtual environment of its own, named by --peers; a library that is not there is said to be left out. Each library
writes the corpus in its own form first. Then each measurement is a fresh process that imports and opens before the
clock starts and reads until its rows or its seconds are over, the libraries interleaved round by round so that a busy
neighbour slows them alike. Printed are medians, all runs and ratios; quote ratios. `limit` is pyarrow's own conversion
to Python objects, 1,000 rows at a time, with nothing around it. `resume` is from a loaded state to the next row of a
shuffled epoch of t, at ten places, in ms.

--work   t (chat rows), i (JPEG images)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import corpora
from scripts.bench.links import HERE, Processes, ended_by_signals
from scripts.bench.readers import LIBRARIES
from scripts.bench.transfer import machine, say, scratch_folder

MODULES = {
    "crucible": "crucible",
    "datasets": "datasets",
    "mosaicml": "streaming",
    "litdata": "litdata",
    "webdataset": "webdataset",
    "limit": "pyarrow",
}
"""Library to what is imported to see whether it is there."""
OTHERS = ("mosaicml", "litdata", "webdataset")
CASES = {
    "t": ("rows", "shuffled rows", "batches", "shuffled batches", "2 workers"),
    "i": ("raw rows", "raw shuffled rows", "decoded rows", "decoded numpy batches of 64"),
}
RESUMES = ("crucible", "datasets", "litdata")
PLACES = 10
MOST_WALKED = 20_000
"""Rows that are read before a state is taken."""


@dataclass
class Row:
    """All runs of one library on one case."""

    work: str
    case: str
    library: str
    runs: list[dict[str, Any]] = field(default_factory=list)

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)

    def record(self, others: Sequence[Row]) -> dict[str, Any]:
        """The row for a machine. Ratios are medians of the rounds: runs of one round had the same neighbours."""
        made = {"work": self.work, "case": self.case, "library": self.library}
        if self.case == "resume":
            exact = all(run["exact"] for run in self.runs)
            worst = max(run["resume_ms"] for run in self.runs)
            return {**made, "ms": round(self.median("resume_ms"), 2), "worst_ms": round(worst, 2), "exact": exact}
        ours = next((row for row in others if row.library == "crucible" and row.case == self.case), self)
        ratios = [mine["rows_per_s"] / own["rows_per_s"] for mine, own in zip(ours.runs, self.runs)]
        return {
            **made,
            "rows_per_s": round(self.median("rows_per_s")),
            "crucible_is_times": round(statistics.median(ratios), 2),
            "first_ms": round(self.median("first_ms"), 1),
            "cpu_us_a_row": round(self.median("cpu_us_a_row"), 2),
            "anon_mb": round(max(run["anon_mb"] for run in self.runs)),
            "runs": [round(run["rows_per_s"]) for run in self.runs],
        }


class Bench:
    """The corpora in a folder, and the libraries that can read them."""

    def __init__(self, options: argparse.Namespace, folder: Path, processes: Processes) -> None:
        self._options, self._folder, self._processes = options, folder, processes
        foreign = ("HF_", "CRUCIBLE_", "RAY_", "RANK", "WORLD_SIZE")
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._env |= {"TMPDIR": str(folder / "tmp"), "TOKENIZERS_PARALLELISM": "false"}
        (folder / "tmp").mkdir()
        self.libraries = [name for name in LIBRARIES if any(part in name for part in options.only.split(","))]
        for name in list(self.libraries):
            argv = [self._python(name), "-c", f"import {MODULES[name]}"]
            if subprocess.run(argv, capture_output=True, check=False).returncode:
                say(options, f"{name} is left out: {argv[0]} cannot import {MODULES[name]} (see --peers)")
                self.libraries.remove(name)

    def _python(self, library: str) -> str:
        return str(self._options.peers) if self._options.peers and library in OTHERS else sys.executable

    def _run(self, library: str, spec: dict[str, Any]) -> dict[str, Any]:
        whole = {**spec, "library": library, "folder": str(self._folder)}
        argv = [self._python(library), str(HERE / "iterate_client.py"), json.dumps(whole)]
        said = self._processes.run([argv], env=self._env).out
        answer: dict[str, Any] = json.loads(said.splitlines()[-1])
        return answer

    def prepare(self, work: str) -> None:
        rows, files = self._options.sizes[work]
        say(self._options, f"making {work}: {rows:,} rows")
        folder = self._folder / work / "data"
        folder.mkdir(parents=True)
        paths = [folder / f"train-{number:05}-of-{files:05}.parquet" for number in range(files)]
        counts = [rows // files + (number < rows % files) for number in range(files)]
        with get_context("spawn").Pool(2) as pool:
            pool.starmap(corpora.CORPORA[work][0], zip(paths, counts, range(files)))
        for library in list(self.libraries):
            say(self._options, f"{work} as {library} keeps it")
            try:
                self._run(library, {"do": "prepare", "work": work})
            except RuntimeError as error:
                say(self._options, f"{library} is left out: {error}")
                self.libraries.remove(library)

    def measure(self, work: str) -> list[Row]:
        rows = [
            Row(work, case, library)
            for case in CASES[work]
            for library in self.libraries
            if case in LIBRARIES[library].cases and self._options.case in case
        ]
        for number in range(self._options.rounds):
            for row in list(rows):
                say(self._options, f"{work} round {number + 1}: {row.case}, {row.library}")
                spec = {"do": "read", "work": work, "case": row.case, "seconds": self._options.seconds}
                try:
                    row.runs.append(self._run(row.library, spec))
                except RuntimeError as error:
                    say(self._options, f"{row.library} is left out of {row.case}: {error}")
                    rows.remove(row)
        return rows + (self._resumes(work) if work == "t" and self._options.case in "resume" else [])

    def _resumes(self, work: str) -> list[Row]:
        rows = [Row(work, "resume", library) for library in RESUMES if library in self.libraries]
        most = min(MOST_WALKED, self._options.sizes[work][0] - 2)
        for place in range(PLACES):
            for row in rows:
                spec = {"do": "resume", "work": work, "done": most * (2 * place + 1) // (2 * PLACES)}
                row.runs.append(self._run(row.library, spec))
        return rows


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    heads = ("case", "library", "rows/s", "crucible is x", "first ms", "CPU us a row", "anon MB", "all runs")
    yield "\n| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for one in (record for record in records if record["case"] != "resume"):
        keys = ("rows_per_s", "crucible_is_times", "first_ms", "cpu_us_a_row", "anon_mb")
        cells = [f"{one[key]:,}" for key in keys] + [" ".join(f"{run:,}" for run in one["runs"])]
        yield f"| {one['work']}: {one['case']} | {one['library']} | " + " | ".join(cells) + " |"
    resumes = [record for record in records if record["case"] == "resume"]
    if resumes:
        yield "\n| resume | library | median ms | worst ms | the next row is the right one |\n|---|---|---|---|---|"
    for one in resumes:
        yield f"| {one['work']} | {one['library']} | {one['ms']} | {one['worst_ms']} | {one['exact']} |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="576k rows of t, 20k of i; default 96k and 4k")
    parser.add_argument("--rows", type=int, help="rows of each corpus, in two files")
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement reads no longer than this")
    parser.add_argument("--work", default="t,i", help="comma list (default all)")
    parser.add_argument("--only", default="", help="libraries whose name contains one of these, comma list")
    parser.add_argument("--case", default="", help="cases whose name contains this")
    parser.add_argument("--peers", type=Path, help="Python that has mosaicml-streaming, litdata and webdataset")
    parser.add_argument("--scratch", type=Path, help="where to write; default is the temporary folder")
    parser.add_argument("--json", action="store_true", help="a line for the machine, then a line for each row")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    options = parser.parse_args(argv)
    options.work = options.work.split(",")
    if {*options.work} - {*CASES} or options.rounds < 1:
        parser.error(f"--work is of {', '.join(CASES)}, and --rounds at least 1")
    if not any(part in name for name in LIBRARIES for part in options.only.split(",")):
        parser.error(f"--only {options.only} leaves no library; there are: {', '.join(LIBRARIES)}")
    chosen = corpora.FULL if options.full else corpora.QUICK
    options.sizes = {name: (options.rows, 2) if options.rows else getattr(chosen, name) for name in CASES}
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    with (
        ended_by_signals(),
        scratch_folder(options.scratch) as scratch,
        Processes() as processes,
    ):
        about = {"machine": machine()}
        print(json.dumps(about) if options.json else about["machine"], flush=True)
        bench = Bench(options, Path(scratch), processes)
        for work in options.work:
            bench.prepare(work)
            rows = bench.measure(work)
            records = [row.record(rows) for row in rows]
            print("\n".join(map(json.dumps, records) if options.json else table(records)), flush=True)


if __name__ == "__main__":
    main()
