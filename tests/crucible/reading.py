"""A process that reads files for a test, so that a crash, a hang or too much memory is seen and not suffered.

It imports no oracle. `Reader.read` hands one file over and says what came of it: rows, or the error and how it reads.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = """
import json, resource, sys, traceback
from pathlib import Path
spec = json.loads(sys.argv[1])

import numpy, pyarrow.compute
import crucible.session
from crucible.errors import CrucibleError
from crucible.formats.items import read_item
from crucible.formats.limits import Limits
from crucible.formats.read import read_file
from crucible.refs import ReadOptions

resource.setrlimit(resource.RLIMIT_DATA, (spec["data_bytes"], spec["data_bytes"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (spec["file_bytes"], spec["file_bytes"]))

def batches(task):
    paths = [Path(path) for path in task["paths"]]
    params = tuple((key, json.dumps(value)) for key, value in sorted(task["params"].items()))
    options = ReadOptions(task["builder"], params)
    limits = Limits(row_bytes=64 << 20, unpacked_bytes=256 << 20)
    if task["how"] == "file":
        yield from read_file(paths[0], task["names"][0], options, task["threads"])
    elif task["how"] == "item":
        for _, batch in read_item(task["names"], paths, options, Path(task["folder"]), limits):
            yield batch
    else:
        dataset = crucible.session.load_dataset(str(paths[0]), split="train")
        yield from dataset.with_format("arrow").iter(batch_size=1000) if dataset.num_rows else ()

def resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10

for line in sys.stdin:
    task = json.loads(line)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS:")
    rows, shown, said = 0, [], {}
    try:
        for batch in batches(task):
            batch.validate(full=True)
            rows += batch.num_rows
            values = batch.slice(0, max(0, 64 - len(shown))).to_pylist()
            shown += [repr(value)[:2000] for value in values]
    except CrucibleError as error:
        said = {"error": type(error).__name__, "says": str(error)}
    except BaseException as error:
        said = {"stray": "".join(traceback.format_exception(error))[-3000:]}
    said["grew"] = resident("VmHWM:") - before
    print(json.dumps({"rows": rows, "shown": shown, **said}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    rows: int
    shown: list[str]
    """The first rows as text."""
    grew: int
    """Bytes of memory that the process had at most, over what it had before."""
    error: str | None = None
    says: str = ""


class Misbehaved(AssertionError):
    """The reader died, hung, or raised what is no CrucibleError."""


class Reader:
    """The process. After a death it is started anew, so that a failing example can be made smaller."""

    def __init__(self, data_bytes: int = 6 << 30, file_bytes: int = 1 << 30, wait_s: float = 30) -> None:
        self._spec = json.dumps({"data_bytes": data_bytes, "file_bytes": file_bytes})
        self._wait_s = wait_s
        self._reads = 0
        self._child: subprocess.Popen[str] | None = None

    def read(
        self,
        paths: Sequence[Path],
        builder: str,
        params: dict[str, Any] | None = None,
        *,
        how: str = "file",
        threads: int = 1,
    ) -> Outcome:
        """`how` is `file` (the reader alone), `item` (with archives and folders) or `load` (a folder, as users do)."""
        self._reads += 1
        if self._reads % 1000 == 0:
            self.close()  # address space that Arrow's allocator keeps for threads that are gone adds up
        child = self._started()
        task = {"paths": [str(path) for path in paths], "names": [path.name for path in paths], "builder": builder}
        task |= {"params": params or {}, "how": how, "threads": threads, "folder": str(paths[0].parent)}
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(task) + "\n")
            child.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            answer = child.stdout.readline() if selector.select(self._wait_s) else None
        if not answer:
            self.close()
            raise Misbehaved("no answer: it hangs" if answer is None else f"it died with {child.returncode}")
        said = json.loads(answer)
        if "stray" in said:
            raise Misbehaved(said["stray"])
        return Outcome(**said)

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None:
            command = [sys.executable, "-X", "faulthandler", "-c", CHILD, self._spec]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._child

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None
