"""Compiles headrace_loader/cuda/mover.c into the wheel where there is a C compiler."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class MoverHook(BuildHookInterface):
    """Without a compiler the wheel works, too; loads from the page cache are then slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, and mark the wheel as built for this platform."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            self.app.display_warning("no C compiler: the loader will do without mover.so")
            return
        source = Path(self.root, "headrace_loader/cuda/mover.c")
        target = source.with_suffix(".so")
        options = ["-O2", "-shared", "-fPIC", "-pthread", str(source), "-o", str(target)]
        subprocess.run([compiler, *options], check=True)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        build_data["artifacts"].append("headrace_loader/cuda/mover.so")
