"""Ranks that are processes: they make equally many steps, and one that is killed costs no row and gives none twice."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crucible.dataset import IterableDataset
from tests.fakes.shards import number_split

ROOT = Path(__file__).resolve().parents[2]

_STEPS = """
import datetime, json, os, pickle, sys
import torch, torch.distributed as dist
from crucible.launch import rank_here
folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
dist.barrier()
steps_group = dist.new_group(timeout=datetime.timedelta(seconds=30))
for case in json.load(open(f"{folder}/cases.json")):
    with open(f"{folder}/{case['split']}.pickle", "rb") as file:
        rows = pickle.load(file).shuffle(case["seed"])
    if case["filter"]:
        rows = rows.filter(lambda row, least=case["filter"]: row["id"] % least == 0)
    mine = rows.shard().batch(case["batch"], end=case["end"])
    if case["start"]:
        mine.load_state_dict(mine.state_after(case["start"]))
    steps, seen = 0, []
    for batch in mine:
        met = torch.ones(1)
        dist.all_reduce(met, group=steps_group)  # a rank with a step less would be waited for here
        assert met.item() == world
        steps += 1
        seen += [number for number, valid in zip(batch["id"], batch.get("valid", [True] * case["batch"])) if valid]
    told = [None] * world
    dist.all_gather_object(told, (steps, seen))
    if rank == 0:
        print(json.dumps(told), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def _steps_of_random_splits(folder: Path, splits: int, seed: int) -> None:
    """Four ranks meet at every step of epochs over uneven shards: some empty, and some with fewer rows than ranks."""
    draw = random.Random(seed)
    cases: list[dict[str, Any]] = []
    totals = []
    for split in range(splits):
        rows = [draw.choice([0, 0, 1, 2, draw.randrange(40)]) for _ in range(draw.randrange(1, 7))]
        if split % 4 == 0:
            rows = [0, draw.randrange(1, 4), 0]
        (folder / str(split)).mkdir()
        made = IterableDataset(*number_split(folder / str(split), rows)).select_columns("id")
        (folder / f"{split}.pickle").write_bytes(pickle.dumps(made))
        for end in ("drop", "pad", "mask"):
            cases.append(
                {
                    "split": split,
                    "seed": draw.randrange(100),
                    "end": end,
                    "batch": draw.randrange(1, 6),
                    "filter": draw.choice([0, 0, 3, 1000]),
                    "start": draw.choice([0, 0, 1]),
                }
            )
            totals.append(sum(rows))
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-W", "ignore", "-c", _STEPS, str(folder)]
    ranks = [
        subprocess.Popen([*command, str(rank), "4"], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in range(4)
    ]
    try:
        said = ranks[0].communicate(timeout=170)[0]
        assert [rank.wait(30) for rank in ranks] == [0] * 4
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    lines = [json.loads(line) for line in said.splitlines()]
    assert len(lines) == len(cases)
    for case, total, told in zip(cases, totals, lines):
        assert len({steps for steps, _ in told}) == 1
        seen = [number for _, numbers in told for number in numbers]
        start = min(total, 4 * case["batch"] * case["start"])
        passed = {number for number in range(total) if not case["filter"] or number % case["filter"] == 0}
        assert set(seen) <= passed
        if case["end"] == "mask" and start == 0:
            assert sorted(seen) == sorted(passed), "valid rows come once"
        elif case["end"] == "pad" and start == 0 and told[0][0]:
            assert set(seen) == passed
        elif case["end"] == "drop":
            assert len(set(seen)) == len(seen)
            assert told[0][0] == (total - start) // (4 * case["batch"])


@pytest.mark.torch
def test_ranks_that_meet_at_every_step_never_wait_for_one_that_has_ended(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    _steps_of_random_splits(tmp_path, 5, seed=1)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_ranks_that_meet_at_every_step_never_wait_on_many_splits(tmp_path: Path, seed: int) -> None:
    pytest.importorskip("torch")
    _steps_of_random_splits(tmp_path, 60, seed)


_RANK = """
import json, os, pickle, signal, sys
folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(f"{folder}/rows.pickle", "rb") as file:
    mine = pickle.load(file).shuffle(3).shard(rank, world).batch(4)
for step, batch in enumerate(mine, 1):
    print(json.dumps(batch["id"]), flush=True)
    if step % 5 == 0:
        with open(f"{folder}/part-{rank}", "w") as file:
            json.dump([step, mine.state_dict()], file)
        os.rename(f"{folder}/part-{rank}", f"{folder}/{rank}-{step}.json")
    if step == 100:
        signal.pause()  # it is killed while it has steps to go, however fast it is
"""


def test_what_was_delivered_after_the_last_state_before_a_kill_is_delivered_once_more_and_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "split").mkdir()
    stream = IterableDataset(*number_split(tmp_path / "split", [700, 1, 0, 900, 2000])).select_columns("id")
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(stream))
    everything = [row["id"] for row in stream.shuffle(3)]
    command = [sys.executable, "-c", _RANK, str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank), "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    logs: list[list[list[int]]] = [[], []]
    try:
        for rank, lines in ((1, 23), (0, 31)):  # rank 1 dies in the middle of its epoch, and with it the job
            out = ranks[rank].stdout
            assert out is not None
            logs[rank] = [json.loads(out.readline()) for _ in range(lines)]
            ranks[rank].kill()
            assert ranks[rank].wait(30) == -9
    finally:
        for one in ranks:
            one.kill()
            one.communicate()
    last = [max(int(path.stem.split("-")[1]) for path in tmp_path.glob(f"{rank}-*.json")) for rank in range(2)]
    step, state = json.loads((tmp_path / f"{last.index(min(last))}-{min(last)}.json").read_text())
    whole = min(step, 20)  # of what a rank wrote, the test has read so much
    if step > whole:
        step, state = json.loads((tmp_path / f"1-{whole}.json").read_text())
    seen = [number for log in logs for batch in log[:step] for number in batch]
    for rank in range(3):
        mine = stream.shuffle(3).shard(rank, 3).batch(4)
        mine.load_state_dict(state)
        seen += [number for batch in mine for number in batch["id"]]
    assert sorted(seen) == sorted(everything)
