"""One timed run of a Python client, in a process of its own: imports first, then the clock, then the work.

    client.py '{"method": "snapshot", "endpoint": "http://...", "repo": "bench/big", "folder": "...", ...}'

Prints one line of JSON: `import_s`, and of what came after it `wall_s`, `cpu_s` (threads and children included),
`requests` where the client knows them, `peak_mb` of the whole process, and `files`: name to path of what it brought.
With `profile` in the spec the work runs under a profiler, whose text goes there.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Spec = dict[str, Any]
Done = dict[str, Path]
Work = Callable[[], Done]
REQUESTS: dict[str, int] = {}
"""What a method knows about its own requests when it has ended."""


def below(folder: Path) -> Done:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def snapshot(spec: Spec) -> Work:
    """The official client. HF_HOME and HF_ENDPOINT come from the environment, fresh."""
    import huggingface_hub

    repo, workers = spec["repo"], spec["workers"]

    def work() -> Done:
        folder = huggingface_hub.snapshot_download(repo, repo_type="dataset", max_workers=workers)
        return {"": Path(folder)}

    return work


def peer_httpx(spec: Spec) -> Work:
    """What httpx alone can do with a peer's shard: `iter_raw` by its own chunks into a file, with or without sha256."""
    import httpx

    url = f"{spec['endpoint']}/v1/shards/{spec['key']}"
    target = Path(spec["folder"]) / "shard"
    hasher = hashlib.sha256() if spec["hash"] else None

    def work() -> Done:
        headers = {"authorization": f"Bearer {spec['secret']}", "accept-encoding": "identity"}
        with (
            httpx.Client(trust_env=False) as client,
            client.stream("GET", url, headers=headers) as response,
            target.open("wb", buffering=0) as file,
        ):
            for chunk in response.iter_raw():
                file.write(chunk)
                if hasher is not None:
                    hasher.update(chunk)
        REQUESTS["requests"] = 1
        return {spec["key"]: target}

    return work


def bring(spec: Spec) -> Work:
    """Ours: the engine for single files whose size and hash are known, one after the other."""
    from crucible.cache.blobs import BlobFolder
    from crucible.config import Settings
    from crucible.hub.http import HubHttp
    from crucible.refs import RepoRef, SourceFile
    from crucible.report import Tally
    from crucible.workers.download import DownloadOptions
    from crucible.workers.download import bring as bring_one
    from crucible.workers.sources import HubSource, PeerSource

    settings, tally = Settings(Path(spec["folder"]), endpoint=spec["endpoint"]), Tally()
    options = DownloadOptions.of(settings)
    files = [SourceFile(name, size, oid, lfs=True) for name, size, oid in spec["files"]]
    blobs = BlobFolder(settings.home / "raw", settings.home / "locks")

    def work() -> Done:
        if spec["secret"]:
            source: Any = PeerSource(spec["endpoint"], spec["secret"], tally, timeout_s=settings.timeout_s)
        else:
            source = HubSource(HubHttp(settings, tally), RepoRef(spec["repo"]))
        done = {file.path: bring_one(file, [source], blobs, options, tally) for file in files}
        REQUESTS["requests"] = tally.counts.requests + tally.counts.peer_requests
        return done

    return work


def pull(spec: Spec) -> Work:
    """Ours: what `crucible hub pull` does, from the name of a repo to its snapshot in a Hub cache."""
    from crucible.cache.hubcache import HubCache
    from crucible.config import Settings
    from crucible.refs import RepoRef
    from crucible.workers.pull import pull as pull_repo

    settings = Settings(Path(spec["folder"]) / "home", endpoint=spec["endpoint"])
    cache = HubCache(Path(spec["folder"]) / "hub")

    def work() -> Done:
        report = pull_repo(RepoRef(spec["repo"]), settings, cache)
        REQUESTS["requests"] = report.counts.requests
        return {"": Path(report.path)}

    return work


METHODS: dict[str, Callable[[Spec], Work]] = {
    "snapshot": snapshot,
    "bring": bring,
    "pull": pull,
    "peer_httpx": peer_httpx,
}


def cpu_s() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def peak_mb() -> float:
    """Of this program alone: `ru_maxrss` would begin with what the process that forked it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main(spec: Spec) -> None:
    begun = time.perf_counter()
    work = METHODS[spec["method"]](spec)
    import_s = time.perf_counter() - begun
    if spec.get("profile"):
        from scripts.bench.sampling import profiled

        watch: Any = profiled(Path(spec["profile"]))
    else:
        watch = nullcontext()
    cpu, started = cpu_s(), time.perf_counter()
    with watch:
        done = work()
    wall, cpu = time.perf_counter() - started, cpu_s() - cpu
    files = below(done[""]) if "" in done else done
    said = {"import_s": import_s, "wall_s": wall, "cpu_s": cpu, "peak_mb": peak_mb(), **REQUESTS}
    print(json.dumps({**said, "files": {name: str(path) for name, path in files.items()}}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
