"""``gatehouse``: the command line. Each command lives in a module that is loaded when it runs."""

from __future__ import annotations

import importlib
import os
import sys

import click

from deployments import __version__
from deployments.cli.errors import CliError, Exit

_COMMANDS = {
    "audit": ("deployments.cli.audit", "audit"),
    "budget": ("deployments.cli.budget", "budget"),
    "chat": ("deployments.cli.access", "chat"),
    "completion": ("deployments.cli.completion", "completion"),
    "config": ("deployments.cli.check", "config"),
    "doctor": ("deployments.cli.check", "doctor"),
    "key": ("deployments.cli.admin", "key"),
    "models": ("deployments.cli.access", "models"),
    "revoke": ("deployments.cli.admin", "revoke"),
    "route": ("deployments.cli.route", "route"),
    "serve": ("deployments.cli.serve", "serve"),
    "token": ("deployments.cli.access", "token"),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command = getattr(importlib.import_module(module), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{module}.{name} is no command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; a reader of a pipe that has gone is no failure."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # NOTE: here, and not around ``main``, because click itself makes an exit code 1 of it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return int(Exit.OK)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gatehouse")
def cli() -> None:
    """Gatehouse: governed access to several language models.

    Exit codes: 0 done, 1 failed, 2 wrong use, 3 not authenticated or not permitted, 4 not found,
    5 service unavailable, 6 refused by policy or limit.
    """


def main() -> None:
    """Entry point; ends the process."""
    try:
        code = cli.main(prog_name="gatehouse", standalone_mode=False)
    except click.Abort:
        click.echo("interrupted", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except Exception as error:
        if os.environ.get("GATEHOUSE_DEBUG"):
            raise
        failure = CliError(
            f"unexpected failure ({type(error).__name__})",
            "run again with GATEHOUSE_DEBUG=1 and report what it prints",
        )
        failure.show()
        code = failure.exit_code
    sys.exit(code if isinstance(code, int) else int(Exit.OK))
