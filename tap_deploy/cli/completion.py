"""``tap-export completion``: shell completion."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "tap-export"
VARIABLE = "_TAP_EXPORT_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a script that completes commands and options in SHELL.

    \b
    bash: tap-export completion bash > ~/.local/share/bash-completion/completions/tap-export
    zsh:  tap-export completion zsh > "${fpath[1]}/_tap-export"
    fish: tap-export completion fish > ~/.config/fish/completions/tap-export.fish
    """  # noqa: D301
    from tap_deploy.cli import main

    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"no completion for {shell}")
    click.echo(completion(main, {}, PROGRAM, VARIABLE).source())
