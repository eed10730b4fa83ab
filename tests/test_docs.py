"""The documents say what the code does: every command and option is in docs/cli.md, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from crucible.cli.app import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "cli.md").read_text()


def commands(group: click.Group = cli, words: str = "crucible") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{words} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{words} {name}")


def sections() -> dict[str, str]:
    """Heading of a command -> its text."""
    parts = re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)[1:]
    return {title: text for title, _, text in (part.partition("\n") for part in parts) if title.startswith("crucible ")}


def documents() -> list[Path]:
    return [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, fenced or indented, and what stands in backticks."""
    fenced = False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()
        else:
            yield from re.findall(r"`([^`]+)`", line)


def test_the_page_has_exactly_the_commands_there_are() -> None:
    assert sorted(sections()) == sorted(name for name, _ in commands())


@pytest.mark.parametrize(("name", "command"), [pytest.param(*pair, id=pair[0]) for pair in commands()])
def test_every_option_is_explained(name: str, command: click.Command) -> None:
    told = sections()[name] + PAGE.partition("\n## ")[0]
    for option in command.params:
        if isinstance(option, click.Option):
            assert any(spelling in told for spelling in option.opts), f"{name} {option.opts}"


@pytest.mark.parametrize("option", [spelling for option in cli.params for spelling in option.opts])
def test_every_global_option_is_explained(option: str) -> None:
    assert f"`{option}`" in PAGE


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_a_document_exist(path: Path) -> None:
    """`crucible xyz` in a code block or in backticks names a command, with options that it has."""
    known = dict(commands())
    for line in code(path.read_text()):
        words = [word for word in line.split("#")[0].split(" | ")[0].split() if not re.match(r"[A-Z_]+=", word)]
        if words[:1] != ["crucible"] or not words[1:] or not words[1].isidentifier():
            continue
        name = " ".join(words[:3]) if " ".join(words[:3]) in known else " ".join(words[:2])
        assert name in known, f"{path.name}: {line}"
        options = {spelling for option in known[name].params for spelling in option.opts}
        assert {word for word in words if word.startswith("--")} <= options | {"--help"}, f"{path.name}: {line}"


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_setting_of_ours_is_on_the_page() -> None:
    source = (ROOT / "crucible" / "config.py").read_text()
    for name in sorted(set(re.findall(r'"(CRUCIBLE_[A-Z_]+)"', source))):
        assert f"`{name}`" in PAGE, name
