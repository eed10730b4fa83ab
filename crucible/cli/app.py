"""The root of the command line: global options, commands found by name, and errors turned into one line."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from typing import Any

import click

from crucible.cli.interrupt import remembered
from crucible.cli.lazy import Lazy
from crucible.errors import CrucibleError, UsageError
from crucible.printable import printable

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 80}

COMMANDS = (
    "prefetch",
    "plan",
    "status",
    "nodes",
    "jobs",
    "locate",
    "verify",
    "repair",
    "rebalance",
    "drain",
    "evict",
    "pin",
    "unpin",
    "gc",
    "verify-epoch",
    "export",
    "import",
    "rotate-secret",
    "tls",
    "data",
    "hub",
)
"""In the order of the help page."""

_RAY_AUTH = "ray._private.authentication.authentication_token_setup"


class WrongUsage(click.ClickException):
    """As click's own UsageError, which would print the usage line too: here the arguments could be parsed."""

    exit_code = 2


class Root(Lazy):
    """Turns what a command raises into one line and an exit code. The only place that does."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with remembered():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted. What finished is kept; the same command goes on from there.", err=True)
            ctx.exit(130)
        except CrucibleError as error:
            _trace(ctx)
            kind = WrongUsage if isinstance(error, UsageError) else click.ClickException
            raise kind(str(error)) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read our output has gone; click ends quietly
            _trace(ctx)
            what = printable(f"{type(error).__name__}: {error}".splitlines()[0])
            raise click.ClickException(
                f"{what} (this is a defect of crucible; run `crucible --debug …` for the traceback)"
            ) from error


def _trace(ctx: click.Context) -> None:
    if ctx.params.get("debug"):
        traceback.print_exc()


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import crucible

        click.echo(f"crucible {crucible.__version__}")
        ctx.exit()


@click.group(cls=Root, folder="crucible.cli.", names=COMMANDS, context_settings=HELP, no_args_is_help=True)
@click.option("--offline", is_flag=True, help="Open no connection to the Hub, as HF_HUB_OFFLINE=1 does.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
def cli(offline: bool, debug: bool) -> None:
    """Bring a Hugging Face dataset into the stores of a cluster, each byte once, and look at what is there.

    \b
    Example:
      crucible plan openai/gsm8k --config main --nodes 8
      crucible prefetch openai/gsm8k --config main
      crucible data head openai/gsm8k --config main -n 3
    """
    if offline:  # in the environment, where the settings are read and Ray's processes inherit it
        os.environ["HF_HUB_OFFLINE"] = "1"
    if not debug:
        logging.getLogger(_RAY_AUTH).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not what Ray says at every start: that its token authentication is on. That it is off is said."""
    return "authentication is enabled" not in record.getMessage()
