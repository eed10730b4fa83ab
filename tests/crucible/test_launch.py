"""Which rank a process is, by its launcher, its libraries, or the group it is in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crucible.config import Settings, node_settings
from crucible.errors import UsageError
from crucible.launch import rank_here, rank_in, rank_of_environment, rank_of_libraries

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, None),
        (TORCHRUN, (3, 8)),
        (SRUN, (1, 4)),
        (MPI, (2, 3)),
        ({**MPI, **SRUN, **TORCHRUN}, (3, 8)),
        ({**MPI, **SRUN}, (1, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "64"}, None),  # the script of sbatch: one process
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, None),  # Lightning: torch knows later
    ],
)
def test_the_launcher_is_believed(env: dict[str, str], place: tuple[int, int] | None) -> None:
    assert rank_of_environment(env) == place
    settings = Settings.from_env(env)
    assert (settings.rank, settings.world_size) == (place or (None, None))


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "1"}, "RANK is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE is set but RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 do not fit"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number from 0 on"),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID='x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told_by_name(env: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        rank_of_environment(env)
    assert said in str(caught.value)


def test_a_ray_worker_is_nobodys_rank_whatever_its_raylet_was_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, **SRUN, **MPI}.items():
        monkeypatch.setenv(name, value)
    assert node_settings().rank is None


def test_libraries_are_asked_only_when_they_were_initialised() -> None:
    def torch(ready: bool) -> Any:
        return SimpleNamespace(
            is_available=lambda: True, is_initialized=lambda: ready, get_rank=lambda: 5, get_world_size=lambda: 6
        )

    def jax(ready: bool) -> Any:
        distributed = SimpleNamespace(is_initialized=lambda: ready)
        return SimpleNamespace(distributed=distributed, process_index=lambda: 1, process_count=lambda: 2)

    assert rank_of_libraries({}) is None
    assert rank_of_libraries({"torch.distributed": torch(False), "jax": jax(False)}) is None
    assert rank_of_libraries({"torch.distributed": torch(True), "jax": jax(True)}) == (5, 6)
    assert rank_of_libraries({"torch.distributed": torch(False), "jax": jax(True)}) == (1, 2)
    assert rank_of_libraries({"jax": SimpleNamespace()}) is None


def test_a_launcher_that_sets_no_rank_is_not_taken_for_one_process() -> None:
    env = {"LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    known = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1, get_world_size=lambda: 2
    )
    assert rank_here(env, {"torch.distributed": known}) == (1, 2)
    assert rank_here({}, {}) is None
    with pytest.raises(UsageError, match="Lightning"):
        rank_here(env, {})


def test_a_group_is_asked_for_the_rank_in_it() -> None:
    mesh = SimpleNamespace(ndim=1, get_local_rank=lambda: 1, size=lambda: 4)
    assert rank_in(mesh) == (1, 4)
    assert rank_in(SimpleNamespace(rank=lambda: 0, size=lambda: 2)) == (0, 2)
    for wrong, said in (
        (SimpleNamespace(ndim=2, get_local_rank=lambda: 1, size=lambda: 4), '"dp"'),
        (SimpleNamespace(rank=lambda: -1, size=lambda: 2), "not in the group"),
        (7, "not int"),
    ):
        with pytest.raises(UsageError, match=said):
            rank_in(wrong)


_GLOO = """
import os, sys
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from crucible.launch import rank_here, rank_in, rank_of_libraries
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
assert rank_of_libraries() == (rank, 2)
mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
assert rank_in(mesh["dp"]) == (0, 1) and rank_in(mesh["tp"]) == (rank, 2)
assert rank_in(dist.group.WORLD) == (rank, 2)
dist.destroy_process_group()
"""


@pytest.mark.torch
def test_torch_says_the_rank_and_the_data_parallel_one_of_a_mesh(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-c", _GLOO]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet")]) for rank in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
