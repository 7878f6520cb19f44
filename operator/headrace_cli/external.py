"""Commands that other packages bring, found by their entry points.

`shard`, `verify`, `delete` and `load` belong to the loader's package, which has neither click nor a
Kubernetes client; an entry point of the group `headrace.commands` is a function that takes
the arguments, the command's own name first, and returns an exit code.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

import click

from headrace_cli.errors import Unavailable

GROUP = "headrace.commands"
KNOWN = {
    "shard": "Cut a model into one shard per GPU.",
    "verify": "Check every byte of a sharded checkpoint.",
    "delete": "Delete sharded checkpoints that nobody uses.",
    "load": "Run a loader, or watch one.",
    "node": "Prepare a node for GPUDirect Storage: check, apply, revert.",
}


def external_command(name: str) -> click.Command:
    """Return a command that hands all its arguments on, also --help."""

    @click.command(
        name,
        help=KNOWN[name],
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def run(arguments: Sequence[str]) -> int:
        return _main_of(name)([name, *arguments])

    return run


def _main_of(name: str) -> Callable[[Sequence[str]], int]:
    points = entry_points(group=GROUP, name=name)
    if not points:
        raise Unavailable(
            f"headrace {name}: belongs to the package headrace-loader, which is not installed; "
            "install headrace-loader[loader] or run it in the loader's image"
        )
    try:
        function: Callable[[Sequence[str]], int] = next(iter(points)).load()
    except ImportError as error:
        raise Unavailable(f"headrace {name}: {error}; install headrace-loader[loader]") from error
    return function
