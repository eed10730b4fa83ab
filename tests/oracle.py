"""`datasets` 5.2 as the oracle, kept off the network and out of the user's cache. Import it before `datasets`."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="crucible-oracle-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets  # noqa: E402  # its settings are read when it is imported

datasets.config.HF_DATASETS_CACHE = _CACHE  # another test may have imported it already
datasets.disable_progress_bars()

__all__ = ["datasets"]
