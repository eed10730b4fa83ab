"""The official clients, unmodified, each in a process of its own: they read HF_ENDPOINT and the like when imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.hubserver.faults import FaultyHub


def client_env(hub: FaultyHub, home: Path, **env: str) -> dict[str, str]:
    """The environment of a client whose Hub is `hub` and whose cache is `home`/hub."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        **env,
    }


def start_client(hub: FaultyHub, home: Path, script: str, **env: str) -> subprocess.Popen[str]:
    """Start a script of asserts. Whoever starts it waits for it, with a bound."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=client_env(hub, home, **env), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_client(hub: FaultyHub, home: Path, script: str, **env: str) -> str:
    """Run a script of asserts in the client's environment and return its output, which is the failure's message."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=client_env(hub, home, **env), cwd=home, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
