"""The command line: python -m imagebuild [NAME ...]."""

from __future__ import annotations

import argparse
import sys

from workspace.errors import ToolError

from .images import IMAGES
from .store import ensure


def main() -> int:
    """Build the named images, all of them by default; returns the exit status."""
    parser = argparse.ArgumentParser(prog="imagebuild", description="Builds the container images.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}")
    names = parser.parse_args().names or list(IMAGES)
    try:
        # Standard output has the archives alone, for $(make images).
        for archive in ensure(names, report=lambda line: print(line, file=sys.stderr)).values():
            print(archive)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
