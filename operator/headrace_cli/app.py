"""The commands of `headrace`; each is imported when it is used, so that --help is quick."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

from headrace_cli.external import KNOWN, external_command

_OWN = {
    "status": "What runs, how far it is and why it waits.",
    "plan": "Predict load time, shard time and cost.",
    "timeline": "A cold start as a picture or a trace.",
    "doctor": "What is wrong with cluster or node, and the fix.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*_OWN, *KNOWN, *super().list_commands(ctx)])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _OWN:
            module = import_module(f"headrace_cli.{cmd_name}_command")
            command: click.Command = module.command
            return command
        if cmd_name in KNOWN:
            return external_command(cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([*_OWN.items(), *KNOWN.items(), ("completion", _COMPLETION)])


_SHELLS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
_COMPLETION = "Print the completion script of a shell."


def _version() -> str:
    try:
        return version("headrace-operator")
    except PackageNotFoundError:
        return "unknown"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="headrace")
def cli() -> None:
    """LLM weights that wait in GPU memory: look at them, plan for them, find what is wrong."""


@cli.command(short_help=_COMPLETION)
@click.argument("shell", type=click.Choice(list(_SHELLS)))
def completion(shell: str) -> None:
    """Print the completion script of a SHELL.

    For bash: source <(headrace completion bash)
    """
    kind = _SHELLS[shell]
    click.echo(kind(cli, {}, "headrace", "_HEADRACE_COMPLETE").source())
