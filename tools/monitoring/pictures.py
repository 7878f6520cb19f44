"""The dashboards as pictures: Grafana's own panel components draw recorded answers in Chromium.

`python -m monitoring.pictures` draws the latest recording again, as the dashboards are now.
"""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from localkube import prerequisites
from workspace.errors import ToolError
from workspace.paths import ROOT
from workspace.process import run

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parent / "page"
SITE = ROOT / ".cache" / "dashboard-page"
RECORDING = ROOT / ".cache" / "dashboard-recording.json"
BOARDS = ROOT / "charts" / "headrace" / "files" / "dashboards"
WIDTH = 1400
HEAD, ROW, GAP = 56, 30, 8  # as in page/src/main.tsx
PACKAGES = {"chromium": "chromium", "node": "nodejs", "npm": "npm"}
INSTALL_SECONDS, DRAW_SECONDS = 600.0, 120.0
# Its sandbox does not work as root; the only page it opens is ours.
CHROMIUM = (
    *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--hide-scrollbars", "--virtual-time-budget=20000"),
)


def draw(directory: Path) -> list[Path]:
    """Draw the recording as dashboard-*.png in a directory; return the files.

    Raises ToolError when the page cannot be built, PrerequisiteError when a package is missing.
    """
    _build()
    return [_picture(path, directory) for path in sorted(BOARDS.glob("*.json"))]


def _build() -> None:
    """Build the page with what its lock file pins, and lay dashboards and recording beside it."""
    prerequisites.install(
        package for command, package in PACKAGES.items() if shutil.which(command) is None
    )
    lock, installed = PAGE / "package-lock.json", PAGE / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        run(["npm", "ci"], cwd=PAGE, timeout=INSTALL_SECONDS)
    build = ["npm", "run", "build", "--", f"--outDir={SITE}", "--emptyOutDir"]
    run(build, cwd=PAGE, timeout=INSTALL_SECONDS)
    shutil.copytree(BOARDS, SITE / "dashboards")
    shutil.copy(RECORDING, SITE / "recording.json")


def _picture(board: Path, directory: Path) -> Path:
    rows = max(
        panel["gridPos"]["y"] + panel["gridPos"]["h"]
        for panel in json.loads(board.read_text())["panels"]
    )
    size = f"--window-size={WIDTH},{HEAD + rows * (ROW + GAP)}"
    target = directory / f"dashboard-{board.stem}.png"
    # Chromium's processes may write for a moment after it has ended.
    profiles = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with _served() as (address, asked), profiles as profile:
        options = [f"--user-data-dir={profile}", size, f"--screenshot={target}"]
        run([*CHROMIUM, *options, f"{address}/?board={board.stem}"], timeout=DRAW_SECONDS)
    failures = [path for path in asked if path.startswith("/failed?")]
    if failures or "/drawn" not in asked:
        reason = unquote_plus(failures[0].partition("?")[2]) if failures else "it did not end"
        raise ToolError(f"{board.name} could not be drawn: {reason}")
    return target


@contextmanager
def _served() -> Iterator[tuple[str, list[str]]]:
    """Serve the page; yields its address, and what is asked of it: it says so when it is drawn."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def main() -> int:
    """Draw docs/dashboard-*.png."""
    for path in draw(ROOT / "docs"):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
