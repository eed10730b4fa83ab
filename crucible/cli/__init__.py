"""The `crucible` command: one module a command, each thin: parse, call one function of `crucible.session`, print.

Importing a command's module costs nothing but click; what it works with is imported when it runs.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    from crucible.cli.app import cli

    cli(prog_name="crucible")
