"""Compiles the loader's C files into the wheel where there is a C compiler."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("headrace_loader/cuda/mover.c", "headrace_loader/backends/digest.c")


class CompileHook(BuildHookInterface):
    """Without a compiler the wheel works, too; loads are then slower."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, and mark the wheel as built for this platform."""
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler is None:
            self.app.display_warning("no C compiler: the loader will do without compiled code")
            return
        for source in SOURCES:
            target = str(Path(source).with_suffix(".so"))
            options = ["-O2", "-shared", "-fPIC", "-pthread", source, "-o", target]
            subprocess.run([compiler, *options], check=True, cwd=self.root)
            build_data["artifacts"].append(target)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
