"""Write the chart's dashboards: `python -m dashboards [--check]`.

With --check nothing is written, and a file that differs from what would be is an error.
"""

from __future__ import annotations

import argparse
import sys

from workspace.paths import ROOT

from .boards import BOARDS
from .grafana import as_json

TARGET = ROOT / "charts" / "headrace" / "files" / "dashboards"


def main() -> int:
    """Write or check the files."""
    parser = argparse.ArgumentParser(prog="dashboards", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    stale = []
    for name, board in BOARDS.items():
        path, text = TARGET / f"{name}.json", as_json(board)
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            TARGET.mkdir(exist_ok=True)
            path.write_text(text)
    for name in stale:
        print(f"{name}.json: " + ("differs, run `make dashboards`" if check else "written"))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
