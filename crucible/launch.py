"""Which rank of how many this process is: from the launcher's environment, or from a library that already knows.

Nothing is imported, initialised or contacted to find out. In order: RANK and WORLD_SIZE (torchrun, Ray Train,
accelerate), a Slurm step's SLURM_PROCID and SLURM_STEP_NUM_TASKS, Open MPI's OMPI_COMM_WORLD_RANK and _SIZE;
then torch.distributed and jax.distributed, where they were initialised before (Lightning does, before `setup`).

In an sbatch script, SLURM_PROCID is 0 and SLURM_NTASKS the size of the job although there is one process: only a step
(srun) has SLURM_STEP_NUM_TASKS, and counts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from crucible.errors import UsageError

LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
"""Variables that say a rank and the number of ranks, in the order in which they are believed."""

Place = tuple[int, int]
"""(rank, world size)"""


def rank_here(env: Mapping[str, str], modules: Mapping[str, Any] | None = None) -> Place | None:
    """The launcher's word, else a library's; None where nobody says that there are several processes."""
    place = rank_of_environment(env) or rank_of_libraries(modules)
    if place is None and env.get("WORLD_SIZE"):
        raise UsageError(
            "WORLD_SIZE and LOCAL_RANK are set but RANK is not, as Lightning's launcher leaves them: call shard() "
            "where torch.distributed runs already, such as in setup(), or give it rank and world_size"
        )
    return place


def rank_of_environment(env: Mapping[str, str]) -> Place | None:
    """The first launcher's word. Raises UsageError when RANK or WORLD_SIZE lacks the other, or they do not fit.

    WORLD_SIZE beside LOCAL_RANK is no word: Lightning's launcher sets these, and only torch.distributed knows the rank.
    """
    for rank_name, size_name in LAUNCHERS:
        names = [name for name in (rank_name, size_name) if env.get(name)]
        if names == ["WORLD_SIZE"] and env.get("LOCAL_RANK"):
            continue
        if rank_name == "RANK" and len(names) == 1:
            missing = size_name if names == [rank_name] else rank_name
            raise UsageError(f"{names[0]} is set but {missing} is not; a launcher such as torchrun sets both")
        if len(names) == 2:
            rank, size = _integer(env, rank_name, 0), _integer(env, size_name, 1)
            if not rank < size:
                raise UsageError(f"{rank_name}={rank} and {size_name}={size} do not fit: a rank is in [0, {size_name})")
            return rank, size
    return None


def rank_of_libraries(modules: Mapping[str, Any] | None = None) -> Place | None:
    """What torch.distributed or jax.distributed says, if this process has initialised one of them."""
    loaded = sys.modules if modules is None else modules
    torch = loaded.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return int(torch.get_rank()), int(torch.get_world_size())
    jax = loaded.get("jax")
    initialized = getattr(getattr(jax, "distributed", None), "is_initialized", None)
    if initialized is not None and initialized():  # else asking for the rank would start jax's backend
        return int(jax.process_index()), int(jax.process_count())  # type: ignore[union-attr]
    return None


def rank_in(group: Any) -> Place:
    """This process's rank in a torch ProcessGroup, or along a one-dimensional DeviceMesh, such as `mesh["dp"]`.

    Ranks that hold parts of one model (tensor or pipeline parallel) have to read the same rows: those of their rank
    among the data-parallel ones.
    """
    if hasattr(group, "get_local_rank") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise UsageError(f'a mesh of {group.ndim} dimensions: name the data-parallel one, as in mesh["dp"]')
        return int(group.get_local_rank()), int(group.size())
    if callable(getattr(group, "rank", None)) and callable(getattr(group, "size", None)):
        rank, size = int(group.rank()), int(group.size())
        if rank < 0:
            raise UsageError("this process is not in the group that shard() was given")
        return rank, size
    raise UsageError(f"shard(group=...) takes a torch ProcessGroup or DeviceMesh, not {type(group).__name__}")


def _integer(env: Mapping[str, str], name: str, least: int) -> int:
    text = env[name].strip()
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name}={text!r} is not a whole number from {least} on")
    return int(text)
