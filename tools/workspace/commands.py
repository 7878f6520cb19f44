"""What each command does; everything but the environment itself runs in .venv."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from . import lock, venv
from .errors import ToolError
from .paths import PYTHON, ROOT
from .process import run
from .steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

CLUSTER = ROOT / ".cache" / "cluster"
CRD = "headrace_operator.api.crd"
MODEL_VALUES = "charts/headrace-model/ci/tiny-values.yaml"
PACKAGES = (
    "operator/headrace_operator",
    "operator/headrace_cli",
    "loader_image/headrace_checkpoint",
    "loader_image/headrace_handover",
    "loader_image/headrace_loader",
    "loader_image/headrace_engine",
    "loader_image/headrace_node",
    "tools/kube/localkube",
    "tools/workspace",
    "tools/imagebuild",
    "tools/demo",
    "tools/dashboards",
    "tools/monitoring",
)
CHECK_SECONDS = 600.0
BUILD_SECONDS = 1800.0
SUITE_SECONDS = 3000.0
# One more than cores, because clusters mostly wait; few, because an engine takes gigabytes.
WORKERS = min(1 + (os.cpu_count() or 1), 4)
SUITE_OPTIONS = (
    "--durations=15",
    f"--numprocesses={WORKERS}",
    "--dist=loadscope",
    "--no-loadscope-reorder",
)


def _venv(_: Sequence[str] = ()) -> int:
    venv.ensure()
    return 0


def _module(name: str, *first: str) -> Callable[[Sequence[str]], int]:
    """Return a command that becomes `python -m name`, with `first` before arguments, in .venv."""

    def command(arguments: Sequence[str]) -> int:
        _venv()
        return _call(["-m", name, *first, *arguments])

    return command


def _bench(name: str) -> Callable[[Sequence[str]], int]:
    def command(arguments: Sequence[str]) -> int:
        _venv()
        return _call([ROOT / "bench" / f"{name}.py", *arguments])

    return command


def _call(arguments: Sequence[str | Path], timeout: float | None = None) -> int:
    """Run .venv's Python on the terminal; it gets a Ctrl-C or SIGTERM too, and time to clean up."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    # Without bytecode each of an engine's processes compiles torch anew: 16 s instead of 5.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen([PYTHON, *arguments], cwd=ROOT, env=environment)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            return process.wait(timeout)
        except KeyboardInterrupt:
            continue
        except subprocess.TimeoutExpired as error:
            process.terminate()
            process.wait(60)
            raise ToolError(f"no end after {timeout:g} s: {arguments}") from error


def _cluster(verb: str, *options: str) -> Callable[[Sequence[str]], int]:
    def command(_: Sequence[str]) -> int:
        _venv()
        return _call(["-m", "localkube", verb, "--dir", CLUSTER, *options])

    return command


def _test(arguments: Sequence[str]) -> int:
    steps = Steps(total=5)
    with steps.step("environment from requirements/dev.txt"):
        _venv()
    with steps.step("Debian packages of a real node"):
        if os.geteuid() == 0:
            _setup("localkube", "install-packages")
        else:
            steps.say("root is missing: the tests that need a real node say so")
    with steps.step("Kubernetes binaries from pinned Go modules (minutes when first built)"):
        _setup("localkube", "build", "--all")
    with steps.step("container images (minutes when first built)"):
        _setup("imagebuild")
    with steps.step("test suite: the longest groups first, in parallel"):
        return _call(["-m", "pytest", *SUITE_OPTIONS, *arguments], SUITE_SECONDS)


def _test_faults(arguments: Sequence[str]) -> int:
    """Kill the operator at every single call as well, which takes longer than the suite may."""
    _venv()
    _setup("localkube", "build", "--all")
    os.environ["HEADRACE_FAULTS"] = "all"
    return _call(["-m", "pytest", "tests/operator/faults", *arguments])


def _test_sglang(arguments: Sequence[str]) -> int:
    """Start SGLang's whole engine as well, whose processes import for a minute."""
    _venv()
    os.environ["HEADRACE_SGLANG"] = "engine"
    return _call(["-m", "pytest", "tests/sglang", *arguments])


def _setup(*module: str) -> None:
    if status := _call(["-m", *module], BUILD_SECONDS):
        raise ToolError(f"{' '.join(module)}: failed with status {status}; the reason is above")


def _lint(_: Sequence[str]) -> int:
    _venv()
    tools = PYTHON.parent
    built = run([PYTHON, "-m", "localkube", "build", "helm"], timeout=BUILD_SECONDS)
    helm = built.splitlines()[-1].removeprefix("helm ")
    checks: dict[str, Sequence[str | Path]] = {
        "formatting": [tools / "ruff", "format", "--check", "."],
        "lint": [tools / "ruff", "check", "."],
        "types": [tools / "mypy", *PACKAGES],
        "dependency directions": [tools / "lint-imports"],
        "generated CRD": [PYTHON, "-m", CRD, "--check"],
        "generated dashboards": [PYTHON, "-m", "dashboards", "--check"],
        "documentation": [tools / "mkdocs", "build", "--strict"],
        "chart": [helm, "lint", "--strict", "charts/headrace"],
        "chart of a model": [helm, "lint", "--strict", "charts/headrace-model", "-f", MODEL_VALUES],
    }
    steps, failed = Steps(total=len(checks)), []
    for name, argv in checks.items():
        with steps.step(name):
            try:
                run(argv, timeout=CHECK_SECONDS, cwd=ROOT)
            except ToolError as error:
                failed.append(name)
                steps.say(str(error))
    print("failed: " + ", ".join(failed) if failed else "all checks passed", file=sys.stderr)
    return 1 if failed else 0


def _check_alerts(arguments: Sequence[str]) -> int:
    _venv()
    _setup("localkube", "build", "promtool")
    return _call(["-m", "pytest", "tests/chart/test_alerts.py", *arguments], CHECK_SECONDS)


def _lock(arguments: Sequence[str]) -> int:
    _venv()
    lock.compile_all(arguments)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": _module("demo"),
    "test": _test,
    "test-faults": _test_faults,
    "test-sglang": _test_sglang,
    "lint": _lint,
    "venv": _venv,
    "images": _module("imagebuild"),
    "bench-loader": _bench("loader"),
    "bench-sharder": _bench("sharder"),
    "bench-operator": _module("bench.operator_scale"),
    "crds": _module(CRD),
    "docs": _module("mkdocs", "build", "--strict"),
    "dashboards": _module("dashboards"),
    "check-alerts": _check_alerts,
    "monitoring": _module("monitoring"),
    "pictures": _module("demo.pictures"),
    "lock": _lock,
    "cluster-up": _cluster("up", "--node"),
    "cluster-down": _cluster("down"),
}
