"""What the simulation raises when something does not hold."""

from __future__ import annotations


class Broken(AssertionError):
    """An invariant does not hold."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name = name
        self.trace: list[str] = []
        """The last events before it."""
