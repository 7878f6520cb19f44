"""Compiles the lock files: hashed requirements, for every platform, without addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import venv
from .paths import REQUIREMENTS, ROOT
from .process import run

if TYPE_CHECKING:
    from collections.abc import Sequence

SECONDS = 600.0
SOURCES: dict[str, tuple[str, ...]] = {
    "build.txt": ("--group", "build"),
    "operator.txt": ("operator/pyproject.toml",),
    "loader.txt": (
        *("loader_image/pyproject.toml", "--extra", "loader", "--extra", "gds"),
        *("--extra", "sources"),
        *("--overrides", "loader_image/overrides.txt"),
    ),
    "engine-cpu.txt": ("--group", "engine"),
    "dev.txt": (
        *("--group", "test", "--group", "lint", "--group", "engine"),
        *("operator/pyproject.toml", "loader_image/pyproject.toml", "--extra", "loader"),
        *("--extra", "sources", "--extra", "cli"),
    ),
    "cli.txt": ("operator/pyproject.toml", "--extra", "cli"),
    # Without what the workspace overrides: torchvision is left out there.
    "sglang.txt": ("requirements/sglang.in", "--no-deps", "--no-config"),
}


def compile_all(options: Sequence[str] = ()) -> None:
    """Compile every lock file; versions stay as they are unless `options` has --upgrade."""
    uv = venv.find_uv()
    common = ["--quiet", "--universal", "--generate-hashes", "--no-header", "--no-annotate"]
    common += ["--python-version", "3.11", *options]
    for name, sources in SOURCES.items():
        command = [uv, "pip", "compile", *common, *sources, "--output-file", REQUIREMENTS / name]
        run(command, timeout=SECONDS, cwd=ROOT)
        print(f"requirements/{name}")
