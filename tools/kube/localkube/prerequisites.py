"""What the real node needs from the machine; said in one message when it is not there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import PrerequisiteError
from .processes import SEARCH_PATH

if TYPE_CHECKING:
    from collections.abc import Iterable

# Command -> Debian package.
COMMANDS = {
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}
PLUGINS = ("bridge", "host-local", "loopback")
PLUGINS_PACKAGE = "containernetworking-plugins"
PLUGIN_DIRECTORIES = ("/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni")
APT_SECONDS = 600


def missing_packages() -> dict[str, list[str]]:
    """Return the Debian packages that are missing, each with what is missing of it."""
    missing: dict[str, list[str]] = {}
    for command, package in COMMANDS.items():
        if shutil.which(command, path=SEARCH_PATH) is None:
            missing.setdefault(package, []).append(command)
    for plugin in PLUGINS:
        if not any((Path(folder) / plugin).exists() for folder in PLUGIN_DIRECTORIES):
            missing.setdefault(PLUGINS_PACKAGE, []).append(f"CNI plugin {plugin}")
    return missing


def check_node() -> None:
    """Raise PrerequisiteError, naming everything that is missing, when no node can run here."""
    problems = []
    if os.geteuid() != 0:
        problems.append(f"root is missing (the effective user id is {os.geteuid()})")
    packages = missing_packages()
    problems += [f"{', '.join(parts)} missing (package {name})" for name, parts in packages.items()]
    if not problems:
        return
    remedies = []
    if packages:
        remedies.append("run `python -m localkube install-packages` as root")
    if os.geteuid() != 0:
        remedies.append("bring the node up as root")
    raise PrerequisiteError(
        f"a real node cannot run here: {'; '.join(problems)}. What works without: the control "
        f"plane and simulated nodes (up without --node). To get a node: {', then '.join(remedies)}"
    )


def install_packages() -> list[str]:
    """Install what a node misses and return the packages' names; raises as `install`."""
    return install(missing_packages())


def install(wanted: Iterable[str]) -> list[str]:
    """Install Debian packages with apt-get and return their names; nothing is done for none.

    Raises PrerequisiteError without root or apt-get, or when apt-get fails.
    """
    packages = sorted(wanted)
    if not packages:
        return []
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PrerequisiteError(
            f"missing packages: {' '.join(packages)}; installing them here takes root and apt-get, "
            "elsewhere install what provides them"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "install", "--quiet", "--yes", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "--quiet"], get):
        result = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=APT_SECONDS,
        )
        if result.returncode:
            raise PrerequisiteError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
    return packages
