"""GPUDirect Storage through kvikio: whether it is really there, and reading with it.

Nothing is attempted before everything it needs has been seen, because cuFile fails badly: without
/proc/modules its initialization never returns, and without nvidia-fs it moves the
data through host memory and calls that success.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_loader.backends import POLICY_OFF, POLICY_OFF_MESSAGE
from headrace_loader.errors import DirectPathUnavailable, StorageError

_NVIDIA_FS = Path("/proc/driver/nvidia-fs/version")
_MODULES = Path("/proc/modules")
_UDEV = Path("/run/udev")


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether GPUDirect Storage can be used; if not, a CamelCase reason and an explanation."""

    available: bool
    reason: str = ""
    message: str = ""


def probe(wanted: bool) -> Probe:
    """Look for all that GPUDirect Storage needs, cheapest first; never blocks."""
    if not wanted:
        return Probe(False, POLICY_OFF, POLICY_OFF_MESSAGE)
    if not _MODULES.exists():
        return Probe(
            False, "ModulesUnreadable", f"{_MODULES} does not exist, cuFile cannot start without it"
        )
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
    return _probe_library()


def _probe_library() -> Probe:
    os.environ.setdefault("CUFILE_LOGFILE_PATH", "/dev/null")
    # Whatever cufile.json says: what cuFile would copy through host memory, it has to refuse.
    os.environ["CUFILE_ALLOW_COMPAT_MODE"] = "false"
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
