"""Finding the cluster's binaries, and building those that are not there yet."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BuildError, PrerequisiteError
from .files import locked
from .modules import MODULES, Module, module_of
from .toolchain import find_go

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logging.getLogger(__name__)

CONTROL_PLANE = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubectl",
)
NODE = ("kubelet", "kube-proxy", "containerd", "containerd-shim-runc-v2", "ctr", "pause")
REPORT_SECONDS = 10.0


def find(binary: str) -> Path | None:
    """Return where `binary` lies already, or None: KUBEBUILDER_ASSETS first, then the cache."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    candidates = [module_of(binary).cache_directory / binary]
    if assets:
        candidates.insert(0, Path(assets) / binary)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def ensure(binaries: Iterable[str]) -> dict[str, Path]:
    """Return the path of each of `binaries`, building what is missing.

    Raises BuildError when a build fails, PrerequisiteError without a Go toolchain.
    """
    wanted = tuple(binaries)
    missing = defaultdict(list)
    for binary in wanted:
        if find(binary) is None:
            missing[module_of(binary).name].append(binary)
    stages = [module for module in MODULES if module.name in missing]
    for number, module in enumerate(stages, start=1):
        _build(module, missing[module.name], f"[{number}/{len(stages)}]")
    return {binary: path for binary in wanted if (path := find(binary))}


def _build(module: Module, binaries: list[str], step: str) -> None:
    if platform.system() != "Linux":
        raise PrerequisiteError(f"localkube runs on Linux, this is {platform.system()}")
    target = module.cache_directory
    with locked(target.with_name(f"{target.name}.lock")):
        # Another process may have built them while this one waited for the lock.
        binaries = [name for name in binaries if find(name) is None]
        if not binaries:
            return
        target.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".build-") as scratch:
            _go_build(module, binaries, Path(scratch), step)
            for name in binaries:
                built = Path(scratch) / _output_name(module.commands[name])
                built.rename(target / name)


def _output_name(package: str) -> str:
    """Return what `go build` calls the binary: the last path element that is no version."""
    *_, parent, last = package.split("/")
    return parent if last.startswith("v") and last[1:].isdigit() else last


def _go_build(module: Module, binaries: list[str], output: Path, step: str) -> None:
    go = find_go(module.go_version)
    environment = {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "-mod=readonly -buildvcs=false",
        "GOWORK": "off",
    }
    packages = [module.commands[name] for name in binaries]
    log.info("%s %s: building %s", step, module.name, ", ".join(binaries))
    command: list[str | Path] = [go, "build", "-v", "-trimpath", "-ldflags", module.linker_flags]
    with subprocess.Popen(
        [*command, "-o", f"{output}/", *packages],
        cwd=module.directory,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as build:
        lines = _follow(build, f"{step} {module.name}")
    if build.returncode:
        raise BuildError(
            f"building {', '.join(binaries)} in {module.directory} ended with status "
            f"{build.returncode}: {' | '.join(lines[-15:])}"
        )


def _follow(build: subprocess.Popen[str], label: str) -> list[str]:
    """Read the output of `go build -v`, one line per compiled package, and report progress."""
    started = time.monotonic()
    lines: list[str] = []

    def collect() -> None:
        lines.extend(line.strip() for line in build.stderr or ())

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    while True:
        reader.join(REPORT_SECONDS)
        elapsed = time.monotonic() - started
        if not reader.is_alive():
            build.wait()
            log.info("%s: done after %.0f s", label, elapsed)
            return lines
        log.info("%s: %d packages compiled, %.0f s elapsed", label, len(lines), elapsed)
