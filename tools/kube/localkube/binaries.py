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
        "GOFLAGS": f"-mod=readonly -buildvcs=false -tags={','.join(module.tags)}",
        "GOWORK": "off",
    }
    packages = [module.commands[name] for name in binaries]
    label = f"{step} {module.name}"
    log.info("%s: building %s", label, ", ".join(binaries))

    def run(*arguments: str, progress: str) -> list[str]:
        with subprocess.Popen(
            [go, *arguments, *packages],
            cwd=module.directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            lines = _follow(process, f"{label}: {progress}")
        if process.returncode:
            raise BuildError(
                f"building {', '.join(binaries)} in {module.directory} ended with status "
                f"{process.returncode}: {' | '.join(lines[-15:])}"
            )
        return lines

    total = len(run("list", "-deps", progress="{} packages found"))
    flags = ("-v", "-trimpath", "-ldflags", module.linker_flags, "-o", f"{output}/")
    # Packages in Go's own cache are not compiled again; the rest of the time goes to linking.
    run("build", *flags, progress=f"{{}} of at most {total} packages compiled")


def _follow(process: subprocess.Popen[str], progress: str) -> list[str]:
    """Return the lines that `process` prints; report their number every now and then."""
    started = time.monotonic()
    lines: list[str] = []

    def collect() -> None:
        lines.extend(line.strip() for line in process.stdout or ())

    reader = threading.Thread(target=collect, daemon=True)
    reader.start()
    while reader.is_alive():
        reader.join(REPORT_SECONDS)
        elapsed = time.monotonic() - started
        if elapsed >= REPORT_SECONDS:
            log.info("%s, %.0f s elapsed", progress.format(len(lines)), elapsed)
    process.wait()
    return lines
