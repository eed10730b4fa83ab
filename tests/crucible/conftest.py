"""What the tests of the base, the session and the command line share."""

from __future__ import annotations

import pytest

from tests.hubserver.faults import FaultyHub


@pytest.fixture
def data(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> FaultyHub:
    """A Hub with `org/toy` (configs a and b) and HF_ENDPOINT pointing to it."""
    card = (
        b"---\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: a/train.jsonl\n"
        b"  - split: test\n    path: a/test.jsonl\n- config_name: b\n  data_files: b/*.csv\n---\n"
    )
    hub.import_files(
        "org/toy",
        {
            "README.md": card,
            "a/train.jsonl": b"".join(b'{"n": %d, "text": "row %d"}\n' % (n, n) for n in range(100)),
            "a/test.jsonl": b'{"n": 0, "text": "line\\nend"}\n',
            "b/one.csv": b"x,y\n1,2\n",
        },
    )
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    return hub
