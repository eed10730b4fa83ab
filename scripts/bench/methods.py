"""The ways to bring a work: ours, the official client's, and curl's, which is what the line and the disk allow.

curl hashes nothing and syncs nothing. The official client hashes nothing it downloads. Ours hashes every byte and
syncs every file before it is given its name; `bring` is the engine alone, given sizes and hashes, `pull` the
command's whole way from the name of a repo to a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.bench.links import HERE, Finished, Processes, Server
from scripts.bench.works import Work

RANGES = 8
PARALLEL = 64


@dataclass(frozen=True)
class Place:
    """Where one run happens: a fresh folder, the server, the processes."""

    work: Work
    server: Server
    folder: Path
    processes: Processes
    profile: Path | None = None

    @property
    def env(self) -> dict[str, str]:
        """Nobody's tokens, caches and proxies; this server as the Hub."""
        foreign = ("HF_", "HUGGING", "CRUCIBLE_", "RAY_", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        ours = {
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "CRUCIBLE_HOME": str(self.folder / "crucible"),
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        return kept | ours


@dataclass(frozen=True)
class Outcome:
    """One run. `wall_s` is without the start of the interpreter and its imports, `process_s` is with them."""

    wall_s: float
    process_s: float
    cpu_s: float
    files: dict[str, Path]
    requests: int | None = None
    peak_mb: float | None = None


Method = Callable[[Place], Outcome]


def python(method: str, **fields: Any) -> Method:
    """A method of `client.py`."""

    def run(place: Place) -> Outcome:
        files = [(name, size, oid) for name, (size, oid) in place.work.files.items()]
        spec = {
            "method": method,
            "endpoint": place.server.endpoint,
            "repo": place.work.repo,
            "folder": str(place.folder),
            "files": files if place.work.kind != "small" else [],
            "key": files[0][0],
            "size": files[0][1],
            "oid": files[0][2],
            "secret": place.work.server.get("secret"),
            "profile": str(place.profile) if place.profile else None,
            **fields,
        }
        ended = place.processes.run([[sys.executable, str(HERE / "client.py"), json.dumps(spec)]], env=place.env)
        said = json.loads(ended.out.splitlines()[-1])
        found = {name: Path(path) for name, path in said["files"].items()}
        return Outcome(
            said["wall_s"], ended.wall_s, said["cpu_s"], found, said.get("requests"), round(said["peak_mb"], 1)
        )

    return run


def _url(place: Place, name: str) -> str:
    if place.work.kind == "peer":
        return f"{place.server.endpoint}/v1/shards/{name}"
    return f"{place.server.endpoint}/datasets/{place.work.repo}/resolve/main/{name}"


def _config(place: Place, urls: bool) -> Path:
    """A curl config file: the secret is not for a command line, and 10,000 urls do not fit on one."""
    lines = ["silent", "show-error", "fail", "location", "create-dirs"]
    if place.work.kind == "peer":
        lines.append(f'header = "Authorization: Bearer {place.work.server["secret"]}"')
    for name in place.work.files if urls else ():
        lines += [f'url = "{_url(place, name)}"', f'output = "{place.folder / "files" / name}"']
    path = place.folder / "curl.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def _curled(place: Place, ended: Finished) -> Outcome:
    requests = 1 if place.work.kind == "peer" else None
    files = {name: place.folder / "files" / name for name in place.work.files}
    return Outcome(ended.wall_s, ended.wall_s, ended.cpu_s, files, requests)


def curl(place: Place) -> Outcome:
    """One connection, one file after the other."""
    argv = ["curl", "-K", str(_config(place, urls=True))]
    return _curled(place, place.processes.run([argv], env=place.env))


def curl_parallel(place: Place) -> Outcome:
    argv = ["curl", "-K", str(_config(place, urls=True)), "-Z", "--parallel-max", str(PARALLEL)]
    return _curled(place, place.processes.run([argv], env=place.env))


def curl_hashed(place: Place) -> Outcome:
    """Then the hash of what came, as one does by hand. coreutils' own sha256 is four times slower than OpenSSL's."""
    script = 'curl -K "$0" && find "$1" -type f -print0 | xargs -0 -n 200 $2 > /dev/null'
    argv = ["sh", "-c", script, str(_config(place, urls=True)), str(place.folder / "files"), SHA256]
    return _curled(place, place.processes.run([argv], env=place.env))


def curl_ranges(place: Place) -> Outcome:
    """Eight processes, each with a range of the same file, which they write where it belongs."""
    config = _config(place, urls=False)
    (place.folder / "files").mkdir()
    walls, cpu = 0.0, 0.0
    for name, (size, _) in place.work.files.items():
        path = place.folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        cuts = [size * number // RANGES for number in range(RANGES + 1)]
        argvs, outs = [], []
        for start, stop in pairwise(cuts):
            argvs.append(["curl", "-K", str(config), "-r", f"{start}-{stop - 1}", _url(place, name)])
            outs.append(os.open(path, os.O_WRONLY))
            os.lseek(outs[-1], start, os.SEEK_SET)
        try:
            ended = place.processes.run(argvs, env=place.env, outs=outs)
        finally:
            for descriptor in outs:
                os.close(descriptor)
        walls, cpu = walls + ended.wall_s, cpu + ended.cpu_s
    return _curled(place, Finished("", walls, cpu))


OURS = ("bring", "pull")
OFFICIAL = ("snapshot_download, 1 worker", "snapshot_download, 8 workers")
CURL = "curl, 1 stream"
SHA256 = "openssl dgst -sha256" if shutil.which("openssl") else "sha256sum"
CURL_HASHED = f"{CURL}, then {SHA256}"
HTTPX = "httpx iter_raw to a file"


def methods(kind: str, *, far: bool) -> dict[str, Method]:
    """Name to method, for a kind of work. Without curl on this machine its rows are left out.

    `far`: the link has latency; then those are left out that would wait for it ten thousand times in a row.
    """
    chosen: dict[str, Method]
    official: dict[str, Method] = {
        OFFICIAL[0]: python("snapshot", workers=1),
        OFFICIAL[1]: python("snapshot", workers=8),
    }
    if kind == "big":
        chosen = {
            "bring": python("bring"),
            "pull": python("pull"),
            **official,
            CURL: curl,
            f"curl, {RANGES} ranges": curl_ranges,
        }
        chosen[CURL_HASHED] = curl_hashed
    elif kind == "small":
        chosen = {"pull": python("pull"), **official, CURL: curl, f"curl, {PARALLEL} at once": curl_parallel}
    else:
        chosen = {"bring": python("bring"), CURL: curl, CURL_HASHED: curl_hashed}
        chosen[HTTPX] = python("peer_httpx", hash=False)
        chosen["httpx iter_raw to a file, sha256 inline"] = python("peer_httpx", hash=True)
    left_out = {OFFICIAL[0], CURL} if far and kind == "small" else set()
    if shutil.which("curl") is None:
        left_out |= {name for name in chosen if name.startswith("curl")}
    return {name: method for name, method in chosen.items() if name not in left_out}
