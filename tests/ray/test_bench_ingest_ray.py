"""The ingest benchmark on a Ray cluster that it starts itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_bench_ingest import TINY, run


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_ingests_the_same_rows_and_its_start_is_apart(tmp_path: Path) -> None:
    _, rows = run(*TINY, "--scratch", str(tmp_path), "--work", "i,j", "--only", "prefetch,load_dataset")
    for alone, cluster in (rows[:2], rows[2:]):
        assert alone["digest"] == cluster["digest"]
        assert cluster["start_s"] > alone["start_s"]  # type: ignore[operator]
