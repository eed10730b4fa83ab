"""Groups whose commands are imported when they are run or listed."""

from __future__ import annotations

import difflib
from importlib import import_module
from keyword import iskeyword
from typing import Any

import click


class Lazy(click.Group):
    """A group of `names`: the module `folder` + name holds the click command `command`; of a name that is a
    word of Python it ends in `_`. Suggests near names."""

    def __init__(self, *args: Any, folder: str, names: tuple[str, ...], **options: Any) -> None:
        super().__init__(*args, **options)
        self.folder, self.names = folder, names

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self.names:
            return None
        module = cmd_name.replace("-", "_") + ("_" if iskeyword(cmd_name) else "")
        found = import_module(f"{self.folder}{module}").command
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.names and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.names, n=2)
            there = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(self.names)}"
            ctx.fail(f"no command {args[0]!r}; {there}")
        return super().resolve_command(ctx, args)
