"""Processes that fetch, read and evict on a small quota, and are killed at any moment: the store keeps to its quota and
loses nothing, and no reader sees a row that is wrong or misses one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crucible.cache.book import RoomBook
from crucible.cache.quota import Quota
from crucible.cache.store import Store
from crucible.cache.usage import Usage
from crucible.dataset import IterableDataset
from crucible.hashing import shard_digest
from crucible.workers.fetch import NodeShards
from crucible.workers.litter import litter
from tests.workers.keeping_cases import ROWS, lay_out, make

FILES = 3
WAIT_S = 120
WORK = """
import json, random, sys
from dataclasses import replace
from pathlib import Path
from crucible.cache.quota import Quota
from crucible.cache.store import Store
from crucible.config import Settings
from crucible.dataset import IterableDataset
from crucible.errors import NoRoom
from crucible.session import data_request, local_job
from crucible.workers.evict import Alone, evict
from crucible.workers.fetch import NodeShards
told = json.loads(sys.argv[1])
settings = Settings(Path(told["home"]), shard_bytes=4 << 20, quota=Quota(size=told["quota"]), ahead_bytes=told["ahead"])
dice, store = random.Random(told["seed"]), Store(settings.home)
print("ready", flush=True)
for _ in range(told["steps"]):
    repo = dice.choice(told["repos"])
    try:
        if dice.random() < 0.2:
            evict(store, dice.randrange(1, 1 << 20), Alone(store, settings), whole=False)
            continue
        request = data_request(repo, None, split="train", revision=None, columns=None)
        manifest = local_job(request, settings)[0][0]
        stream = IterableDataset(manifest, NodeShards(settings))
        if dice.random() < 0.5:
            stream = stream.shuffle(seed=dice.randrange(9))
        rows = [row["id"] for row in stream]
        assert sorted(rows) == list(range(manifest.rows)), "a row is missing"
    except NoRoom:
        print("no room", flush=True)
    else:
        print("read", flush=True)
"""


def start(told: dict[str, Any], seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK, json.dumps({**told, "seed": seed})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def stopped(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    """A moment: who looks at a store in use counts what is evicted meanwhile, and what comes in its place."""
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        for process in processes:
            if process.returncode is None:
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def play(tmp_path: Path, seed: int, kills: int) -> None:
    dice = random.Random(seed)
    repos = [lay_out(tmp_path / name, files=FILES) for name in ("a", "b", "c")]
    whole = [make(repo, tmp_path / "whole")[1] for repo in repos]
    digests = {shard.key: shard.digest for manifest in whole for shard in manifest.shards}
    biggest = max(shard.size for manifest in whole for shard in manifest.shards)
    home = tmp_path / "home"
    quota = 6 * biggest
    told = {"home": str(home), "quota": quota, "repos": list(map(str, repos)), "steps": 6, "ahead": 2 * biggest}
    store, usage = Store(home), Usage(home)
    processes = [start(told, dice.randrange(1 << 30)) for _ in range(2)]
    outcomes: list[str] = []
    end = time.monotonic() + WAIT_S
    try:
        while processes:
            assert time.monotonic() < end
            # what is about to be written was promised, so at no moment is there more than the quota
            with stopped(processes):
                assert usage.bytes() <= quota
            for key, _ in store.shards():
                try:
                    assert shard_digest(store.shard_path(key)) == digests[key]
                except FileNotFoundError:
                    continue  # evicted between the two looks
            process = dice.choice(processes)
            if kills and dice.random() < 0.04:
                kills -= 1
                process.send_signal(signal.SIGKILL)
                process.communicate(timeout=WAIT_S)
                processes[processes.index(process)] = start(told, dice.randrange(1 << 30))
            for one in [one for one in processes if one.poll() is not None]:
                out, problem = one.communicate(timeout=WAIT_S)
                assert one.returncode == 0, problem
                outcomes += out.split("\n")
                processes.remove(one)
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=WAIT_S)
    assert outcomes.count("read") > 0
    assert RoomBook(home).reserved() == 0
    settings, _ = make(repos[0], home, quota=Quota(size=quota))  # which removes what the killed left
    for manifest in whole:
        rows = sorted(row["id"] for row in IterableDataset(manifest, NodeShards(settings)))
        assert rows == list(range(FILES * ROWS))
    assert Usage(home).bytes() <= quota
    assert [one for one in litter(store) if one.kind != "record without shards"] == []


@pytest.mark.parametrize("seed", [1, 2])
def test_a_small_quota_survives_readers_evictions_and_kills(tmp_path: Path, seed: int) -> None:
    play(tmp_path, seed, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_a_small_quota_survives_readers_evictions_and_kills_for_long(tmp_path: Path, seed: int) -> None:
    play(tmp_path, seed, kills=20)
