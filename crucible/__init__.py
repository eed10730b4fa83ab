"""Prefetch, verify, convert and shard Hugging Face repos once per cluster, and read them on every rank.

    import crucible
    report = crucible.prefetch("openai/gsm8k", "main", split="train", address="auto")
    ds = crucible.load_dataset("openai/gsm8k", "main", split="train")

Names are looked up when first used (PEP 562), so `import crucible` loads neither ray nor pyarrow, and a worker that
imports `crucible.refs` does not pull in session -> cluster -> workers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; at run time `__getattr__` fetches the same names
    from crucible import errors
    from crucible.compose import concatenate_datasets, interleave_datasets, split_dataset_by_node
    from crucible.dataset import Dataset, DatasetDict, IterableDataset
    from crucible.errors import CrucibleError
    from crucible.loaders import state_of_loader
    from crucible.session import load_dataset, plan, prefetch

    __version__: str

__all__ = [
    "CrucibleError",
    "Dataset",
    "DatasetDict",
    "IterableDataset",
    "__version__",
    "concatenate_datasets",
    "errors",
    "interleave_datasets",
    "load_dataset",
    "plan",
    "prefetch",
    "split_dataset_by_node",
    "state_of_loader",
]

_HOME_OF = {
    "CrucibleError": "crucible.errors",
    "Dataset": "crucible.dataset",
    "DatasetDict": "crucible.dataset",
    "IterableDataset": "crucible.dataset",
    "concatenate_datasets": "crucible.compose",
    "interleave_datasets": "crucible.compose",
    "split_dataset_by_node": "crucible.compose",
    "state_of_loader": "crucible.loaders",
    "load_dataset": "crucible.session",
    "plan": "crucible.session",
    "prefetch": "crucible.session",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name == "errors":
        value = import_module("crucible.errors")
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module 'crucible' has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("crucible-data")
    except PackageNotFoundError:  # a checkout on PYTHONPATH, or Ray's working_dir: there is no metadata
        return "0+unknown"
