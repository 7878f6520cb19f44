"""GPUDirect Storage through kvikio: whether it is really there, and reading with it.

Nothing is attempted before everything it needs has been seen, because cuFile fails badly: without
/proc/modules its initialization never returns, and without nvidia-fs it moves the
data through host memory and calls that success.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_loader.backends import POLICY_OFF, POLICY_OFF_MESSAGE
from headrace_loader.errors import DirectPathUnavailable, StorageError

_NVIDIA_FS = Path("/proc/driver/nvidia-fs/version")
_MODULES = Path("/proc/modules")
_UDEV = Path("/run/udev")
_CONFIGURATION = Path("/etc/cufile.json")
_COPYING = re.compile(r'"posix_gds_min_kb"\s*:\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether GPUDirect Storage can be used; if not, a CamelCase reason and an explanation."""

    available: bool
    reason: str = ""
    message: str = ""


def probe(wanted: bool) -> Probe:
    """Look for all that GPUDirect Storage needs, cheapest first; then ask cuFile itself."""
    if not wanted:
        return Probe(False, POLICY_OFF, POLICY_OFF_MESSAGE)
    try:
        _MODULES.read_bytes()
    except OSError as error:
        message = f"{_MODULES}: {error.strerror}: cuFile cannot start without it"
        return Probe(False, "ModulesUnreadable", message)
    if not _NVIDIA_FS.exists():
        return Probe(
            False,
            "NvidiaFsMissing",
            f"{_NVIDIA_FS} does not exist: the kernel module nvidia-fs is not loaded on this node",
        )
    if not os.access(_UDEV, os.R_OK):
        return Probe(
            False, "UdevUnreadable", f"{_UDEV} is not readable: mount it read-only into the pod"
        )
    if copies := _copying_setting():
        return Probe(False, "CuFileConfiguration", copies)
    return _probe_library()


def _copying_setting() -> str:
    """Return what is wrong with a setting that has cuFile copy through host memory all the same.

    Source: NVIDIA, cuFile API reference, "cuFile Compatibility Mode", lustre:posix_gds_min_kb.
    """
    path = Path(os.environ.get("CUFILE_ENV_PATH_JSON", _CONFIGURATION))
    try:
        text = path.read_text()
    except OSError:
        return ""  # its defaults apply
    for number in _COPYING.findall(re.sub(r"(?m)^\s*//.*$", "", text)):
        if int(number):
            return (
                f"{path}: posix_gds_min_kb: {number}: must be 0, or cuFile reads by POSIX; set it"
            )
    return ""


def _probe_library() -> Probe:
    os.environ.setdefault("CUFILE_LOGFILE_PATH", "/dev/null")
    # Whatever cufile.json says: what cuFile would copy through host memory, it has to refuse.
    os.environ["CUFILE_ALLOW_COMPAT_MODE"] = "false"
    os.environ["CUFILE_FORCE_COMPAT_MODE"] = "false"
    try:
        import kvikio
        import kvikio.cufile_driver
    except (ImportError, RuntimeError) as error:
        return Probe(False, "KvikioMissing", f"kvikio cannot be used: {error}")
    try:
        kvikio.defaults.set({"compat_mode": kvikio.CompatMode.OFF, "num_threads": 1})
        available = kvikio.cufile_driver.get("is_gds_available")
    except RuntimeError as error:  # what it raises where the driver cannot be opened
        return Probe(False, "CuFileUnavailable", f"cuFile cannot be opened: {error}")
    if not available:
        return Probe(False, "CuFileUnavailable", "cuFile finds no GPUDirect Storage on this node")
    return Probe(True)


class DirectFile:
    """A file open for GPUDirect reads.

    Raises:
        DirectPathUnavailable: cuFile does not take the file system.
    """

    def __init__(self, path: Path) -> None:
        import kvikio

        self._path = path
        try:
            self._file = kvikio.CuFile(path, "r")
        except RuntimeError as error:
            raise DirectPathUnavailable(f"{path}: cuFile refuses the file: {error}") from None

    def read(self, pointer: int, offset: int, size: int) -> None:
        """Read `size` bytes at `offset` to the device address `pointer`.

        Raises:
            StorageError: cuFile failed, or the file ends early.
        """
        try:
            count = self._file.raw_read(_DeviceBuffer(pointer, size), size, offset)
        except RuntimeError as error:
            raise StorageError(f"{self._path}: cuFile read at {offset}: {error}") from None
        if count != size:
            raise StorageError(f"{self._path}: cuFile read {count} of {size} bytes at {offset}")


class _DeviceBuffer:
    """Device memory in the form that kvikio takes."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (pointer, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }
