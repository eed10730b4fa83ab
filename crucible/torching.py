"""What torch's DataLoader wants of a dataset, without importing torch for it."""

from __future__ import annotations

import sys

_classes: dict[tuple[type, type], type] = {}


def worker() -> tuple[int, int]:
    """(worker, workers) of the DataLoader worker this process is, else (0, 1)."""
    torch_data = sys.modules.get("torch.utils.data")
    info = None if torch_data is None else torch_data.get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def torch_class(ours: type) -> type:
    """`ours` as `isinstance` should see it: once torch is loaded, also a torch IterableDataset.

    DataLoader chooses how to read by `isinstance`. A base class would mean importing torch; `datasets` changes
    `__bases__` when a dataset is made, which misses one that was made before torch was imported.
    """
    torch_data = sys.modules.get("torch.utils.data")
    if torch_data is None:
        return ours
    key = (ours, torch_data.IterableDataset)
    if key not in _classes:
        _classes[key] = type(ours.__name__, key, {"__module__": ours.__module__})
    return _classes[key]
