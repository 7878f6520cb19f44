"""Records one real cold start as pictures: python -m demo.pictures [DIRECTORY].

`headrace status --watch -o json` runs beside it; of what it tells, one moment of each stage is
drawn as the command draws it (status.svg). `headrace timeline` draws the whole (timeline.svg).
The engine is real vLLM, the model random and large enough for a load to be seen.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.text import Text

import imagebuild
from headrace_cli.status_command import render
from localkube import Cluster, binaries, prerequisites
from workspace.errors import ToolError
from workspace.paths import ROOT
from workspace.process import run
from workspace.steps import Steps

from . import setup
from .__main__ import CLAIM, MANIFEST, NAME, READY_SECONDS
from .observe import Model
from .once import on_a_cluster

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import RenderableType

SIZE = ("--hidden-size=2048", "--intermediate-size=5632", "--heads=16", "--layers=8")
STAGES = ("shard", "load", "engine", "ready")
WIDTH = 118
INTERVAL = "0.1"
COMMAND_SECONDS = 60.0
# Rich's pictures fetch a font; pages of this documentation fetch nothing from elsewhere.
FONT = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)

Document = dict[str, Any]
Moment = tuple[float, Document]


@dataclass
class Watch:
    """Runs `headrace status --watch` and keeps what it tells, with the seconds since its start."""

    cluster: Cluster
    moments: list[Moment] = field(default_factory=list)

    def __enter__(self) -> Self:
        began = time.monotonic()
        self._process = subprocess.Popen(
            headrace(self.cluster, "status", NAME, "--watch", "-o", "json", "--interval", INTERVAL),
            stdout=subprocess.PIPE,
            text=True,
        )

        def read() -> None:
            for line in self._process.stdout or ():
                self.moments.append((time.monotonic() - began, json.loads(line)))

        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(COMMAND_SECONDS)
        self._thread.join(COMMAND_SECONDS)


def headrace(cluster: Cluster, *arguments: str) -> list[str]:
    """Return the command line of `headrace` for the cluster."""
    return [sys.executable, "-m", "headrace_cli", *arguments, f"--kubeconfig={cluster.kubeconfig}"]


def stage(document: Document) -> str:
    """Return the stage of the model's newest pod; empty before there is one."""
    pods = document["modelDeployments"][0]["pods"]
    serving = [pod for pod in pods if pod["component"] == "serve"]
    return str((serving or pods or [{"stage": ""}])[-1]["stage"])


def loaded(document: Document) -> float:
    """Return the part of the weights that loaders have read, from 0 to 1."""
    pods = document["modelDeployments"][0]["pods"]
    loaders = [pod["loader"] for pod in pods if pod["loader"]]
    total = sum(loader.get("totalBytes") or 0 for loader in loaders)
    return sum(loader.get("readBytes") or 0 for loader in loaders) / total if total else 0.0


def chosen(moments: Iterable[Moment]) -> list[Moment]:
    """Return one moment of each stage: of loading the one nearest its middle, else the last."""
    found: dict[str, Moment] = {}
    for moment in moments:
        name = stage(moment[1])
        best = found.get(name)
        if name != "load" or best is None or _from_half(moment) < _from_half(best):
            found[name] = moment
    return [found[name] for name in STAGES if name in found]


def _from_half(moment: Moment) -> float:
    return abs(loaded(moment[1]) - 0.5)


def draw(moments: Sequence[Moment]) -> str:
    """Return the moments below each other as an SVG picture of a terminal."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    parts: list[RenderableType] = []
    for seconds, document in moments:
        parts += [Text(f"after {seconds:.1f} s", "dim italic"), render(document)]
    console.print(Group(*parts), end="")
    return FONT.sub("", console.export_svg(title="headrace status --watch"))


def record(steps: Steps, cluster: Cluster, volume: Path, directory: Path) -> None:
    """Do everything but the teardown. Raises ToolError or LocalkubeError."""
    with steps.step("binaries, images and a random model"):
        prerequisites.install_packages()
        binaries.ensure([*binaries.CONTROL_PLANE, *binaries.NODE, "helm"])
        archives = imagebuild.ensure(report=steps.say)
        setup.make_model(volume / NAME, *SIZE)
    with steps.step("a cluster with a real node and the operator"):
        setup.prepare_node(cluster, archives.values())
        setup.make_volume(cluster, volume, CLAIM)
        setup.install_operator(cluster)
    model = Model(cluster, NAME)
    with steps.step("a cold start, watched"):
        cluster.kubectl("apply", "-f", str(MANIFEST))
        with Watch(cluster) as watch:
            model.wait_true("Ready", timeout=READY_SECONDS, say=steps.say)
            time.sleep(2)
    moments = chosen(watch.moments)
    missing = set(STAGES) - {stage(document) for _, document in moments}
    if missing:
        raise ToolError(f"status --watch showed no moment of {', '.join(sorted(missing))}")
    with steps.step(f"{directory}/status.svg and timeline.svg"):
        (directory / "status.svg").write_text(draw(moments))
        timeline = ("timeline", NAME, "--format=svg", f"--file={directory / 'timeline.svg'}")
        run(headrace(cluster, *timeline), timeout=COMMAND_SECONDS)


def main() -> int:
    """Record and tear everything down."""
    parser = argparse.ArgumentParser(prog="pictures", description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT / "docs")
    directory = parser.parse_args().directory
    return on_a_cluster(
        "pictures",
        lambda cluster, root: record(Steps(total=4), cluster, root / "volume", directory),
    )


if __name__ == "__main__":
    sys.exit(main())
