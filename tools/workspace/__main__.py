"""The command line behind the Makefile: python3 -m workspace COMMAND [ARGUMENT ...]."""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is where older ones are told
    found = ".".join(str(part) for part in sys.version_info[:3])
    sys.exit(f"Python >= 3.11 is needed, {sys.executable} is {found}; make PYTHON=python3.12 ...")

from . import commands
from .errors import ToolError


def main() -> int:
    """Run one command; returns the exit status."""
    name, *arguments = sys.argv[1:] or [""]
    command = commands.COMMANDS.get(name)
    if command is None:
        print(f"usage: python3 -m workspace {'|'.join(commands.COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return command(arguments)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
