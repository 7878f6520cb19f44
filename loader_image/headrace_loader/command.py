"""The `headrace` command: the sharder's commands, and `load`, which runs or watches a loader.

Where the command line for people is installed, too, it takes all other words, found by
its entry point; it has what this image does without.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from headrace_checkpoint import signals
from headrace_checkpoint.report import add_form, printing

DEFAULT_URL = "http://127.0.0.1:9400"
_OWN = ("shard", "verify", "delete", "load")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in _OWN:
        for point in entry_points(group="headrace.cli", name="main"):
            command: Callable[[Sequence[str]], int] = point.load()
            return command(given)
    with signals.kept(), printing():
        return _run(given)


def _run(arguments: Sequence[str]) -> int:
    try:
        from headrace_checkpoint.cli import parser as checkpoint_parser
        from headrace_checkpoint.cli import run as run_checkpoint
    except ModuleNotFoundError as error:
        sys.stderr.write(f"headrace: {error.name} is missing; install headrace-loader[loader]\n")
        return os.EX_UNAVAILABLE
    parser, commands = checkpoint_parser()
    load = commands.add_parser(
        "load",
        help="run a loader, or --watch one",
        description="Run a loader with the options of headrace-loader, or watch one that runs.",
        usage="headrace load --checkpoint DIRECTORY --backend BACKEND [...] | --watch [URL]",
        add_help=False,
    )
    load.add_argument("--watch", nargs="?", const=DEFAULT_URL, metavar="URL")
    add_form(load, "--output")
    load.set_defaults(command=_load)
    options, others = parser.parse_known_args(arguments)
    if options.command is not _load and others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    options.others = others
    return _load(options) if options.command is _load else run_checkpoint(options)


def _load(options: argparse.Namespace) -> int:
    if options.watch is None:
        from headrace_loader import __main__ as loader

        return loader.main(options.others)
    from headrace_loader import watch

    return watch.main([options.watch, f"--output={options.form}", *options.others])


if __name__ == "__main__":
    sys.exit(main())
