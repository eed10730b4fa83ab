"""`crucible hub serve`: a local Hub over a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from crucible.cli import options
from crucible.cli.show import print_json
from crucible.errors import UsageError

if TYPE_CHECKING:
    from crucible.hub.server import HubServer, User

_PORT = click.IntRange(0, 65535)


@click.command("serve")
@click.argument("root", type=click.Path(file_okay=False, path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", metavar="N", type=_PORT, default=8080, show_default=True, help="0: any free one.")
@click.option(
    "--cdn-port", metavar="N", type=_PORT, default=0, help="Where big files come from, another origin; 0: any free one."
)
@click.option(
    "--import",
    "imports",
    nargs=2,
    multiple=True,
    metavar="DIR REPO",
    help="First make dataset REPO hold the files of DIR; repeatable.",
)
@click.option(
    "--tokens",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File with one `TOKEN USER [ORG…]` a line: who may see private repos.",
)
@click.option(
    "--request-log",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append one JSON line a request to this.",
)
@options.as_json
@options.quiet
def command(
    root: Path,
    host: str,
    port: int,
    cdn_port: int,
    imports: tuple[tuple[str, str], ...],
    tokens: Path | None,
    request_log: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Serve the repos in folder ROOT as a Hub, until Ctrl-C.

    ROOT is made if it is not there. Clients reach it with HF_ENDPOINT: crucible, huggingface_hub and datasets alike.
    Ctrl-C and SIGTERM end it with exit code 0.

    \b
    Example:
      crucible hub serve ./my-hub --import ./my-data me/my-data
      HF_ENDPOINT=http://127.0.0.1:8080 crucible data head me/my-data
    """
    from crucible.hub.server import HubOptions, import_folder, serve

    def ready(server: HubServer) -> None:
        if as_json:
            print_json({"endpoint": server.endpoint, "cdn_endpoint": server.cdn_endpoint, "root": str(root)})
        else:
            click.echo(f"serving {root} at {server.endpoint}")
        if not quiet:
            click.echo(f"use it with HF_ENDPOINT={server.endpoint}; stop it with Ctrl-C", err=True)

    for folder, repo in imports:
        commit = import_folder(root, repo, folder)
        if not quiet:
            click.echo(f"{repo}: imported {folder} as {commit[:12]}", err=True)
    behaviour = HubOptions(tokens=read_tokens(tokens) if tokens else {}, log_path=request_log)
    try:
        serve(root, host=host, port=port, cdn_port=cdn_port, options=behaviour, ready=ready)
    except OSError as error:
        raise click.ClickException(f"cannot serve {root} at {host}:{port}: {error.strerror or error}") from error


def read_tokens(path: Path) -> dict[str, User]:
    """Token to user. A file and not an option, because every user of a machine can read a command line."""
    from crucible.hub.server import User

    users = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2:
            raise UsageError(f"{path}, line {number}: write `TOKEN USER [ORG…]`")
        users[words[0]] = User(words[1], tuple(words[2:]))
    return users
