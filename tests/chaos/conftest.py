"""The stage that all stories share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.stage import Stage, stage


@pytest.fixture(scope="module")
def chaos_stage() -> Iterator[Stage]:
    with (
        tempfile.TemporaryDirectory(prefix="crucible-chaos-", ignore_cleanup_errors=True) as folder,
        stage(Path(folder)) as made,
    ):
        yield made
