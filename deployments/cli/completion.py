"""``gatehouse completion``: shell completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from deployments.cli.errors import CliError

_HOW = {
    "bash": 'eval "$(gatehouse completion bash)"   in ~/.bashrc',
    "zsh": 'eval "$(gatehouse completion zsh)"   in ~/.zshrc',
    "fish": "gatehouse completion fish > ~/.config/fish/completions/gatehouse.fish",
}


@click.command(epilog="Install: " + "; ".join(_HOW.values()))
@click.argument("shell", type=click.Choice(sorted(_HOW)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a SHELL."""
    kind = get_completion_class(shell)
    root = context.find_root().command
    if kind is None:
        raise CliError(f"no completion for {shell}")
    click.echo(kind(root, {}, "gatehouse", "_GATEHOUSE_COMPLETE").source())
