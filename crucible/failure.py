"""The root of all errors. `crucible.errors` has the tree, and is where to import any of it from."""

from __future__ import annotations


class CrucibleError(Exception):
    """Base of all errors of this package."""
