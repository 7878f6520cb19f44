"""Starts the `headrace-loader` command."""

import sys
from collections.abc import Sequence

from headrace_checkpoint import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loader until it is told to stop; returns the exit code."""
    with signals.kept():
        from headrace_loader.cli import main as run

        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
