"""Lets each call of the stand-in for the GPU driver fail, in two ways: a script of its own.

    LD_LIBRARY_PATH=... python cuda_faults.py CHECKPOINT MOVER

First a forked child loads rank 0 of CHECKPOINT as a worker does, once for every way of the bytes:
with MOVER, the compiled mover.c, without it, by direct reads, and by GPUDirect Storage, mocked as a
read to the same place, also where it takes no file, or takes them and refuses to read. Then one
for every call, which fails for lack of memory, and for a defect of the GPU's; last, a GPU that has
no code. Prints one line of JSON for each: the call, the way, the code, which call of that name
fails (0: all), what the load ended with, and why it did not go by GPUDirect.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

from headrace_loader.backends import (
    BackendOptions,
    PathPolicy,
    PathReport,
    open_backend,
    reading,
)
from headrace_loader.checkpoint import load_manifest
from headrace_loader.cuda import driver, gds, native
from headrace_loader.errors import DirectPathUnavailable, LoaderError, StorageError

UNUSED = {"_free_address", "_release", "_unmap", "_clear_async", "_memory_info"}
"""They take back what a process that ends gives back, are of GPUDirect, or for a message."""
OUT_OF_MEMORY, DEFECT = 2, 214  # CUDA_ERROR_ECC_UNCORRECTABLE
NO_BINARY = 209
ONCE = [
    (call, "compiled", DEFECT, nth)
    for call in ("cuStreamWaitEvent", "cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventQuery")
    for nth in (3, 4, 5)
]
"""What fails once, when a part of the weights is done already."""
WAYS = {
    "compiled": PathPolicy.OFF,
    "interpreted": PathPolicy.OFF,
    "direct": PathPolicy.OFF,
    "mocked GPUDirect": PathPolicy.REQUIRE,
    "refused GPUDirect": PathPolicy.PREFER,
    "unsupported GPUDirect": PathPolicy.PREFER,
    "refused and required GPUDirect": PathPolicy.REQUIRE,
    "unsupported and required GPUDirect": PathPolicy.REQUIRE,
}


class Silent:
    """Progress that nobody looks at but for the number of bytes, and why not by GPUDirect."""

    def __init__(self) -> None:
        self.bytes = 0
        self.why_not = ""

    def path(self, report: PathReport) -> None:
        """Remember the reason."""
        self.why_not = report.direct_reason

    def read(self, nbytes: int) -> None:
        """Count."""
        self.bytes += nbytes

    def verified(self, nbytes: int) -> None:
        """Do nothing."""


class MockedDirectFile:
    """Stands for cuFile, which needs nvidia-fs."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, pointer: int, offset: int, size: int) -> None:
        """Read to a device address, which is one of the host here."""
        ctypes.memmove(pointer, os.pread(self._descriptor, size, offset), size)


class RefusingDirectFile(MockedDirectFile):
    """As cuFile where it cannot register the GPU's memory."""

    def read(self, pointer: int, offset: int, size: int) -> None:
        """Fail."""
        raise StorageError(f"cuFile read at {offset}: 5030")


class UnsupportedDirectFile(MockedDirectFile):
    """As cuFile where it does not know the file system."""

    def __init__(self, path: Path) -> None:
        raise DirectPathUnavailable(f"{path}: cuFile refuses the file: 5030")


def calls() -> list[str]:
    """Names of the driver's functions that a load calls."""
    functions = {name: value for name, value in vars(driver).items() if name not in UNUSED}
    names = {getattr(value, "__name__", "") for value in functions.values()}
    return sorted(name for name in names.union(native.CALLS) if name.startswith("cu"))


def load(checkpoint: Path, policy: PathPolicy) -> tuple[str, str]:
    """Load rank 0 into memory whose end is not clean; returns its end, and why not direct."""
    progress = Silent()
    try:
        backend = open_backend("cuda", BackendOptions(0, policy, 2, 2))
        assert backend.device.startswith("GPU-")
        sources = load_manifest(checkpoint).sources(0)
        regions = [backend.allocate(source.nbytes) for source in sources]
        for region, source in zip(regions, sources, strict=True):
            ctypes.memset(region.pointer + source.nbytes - 8, 0xFF, 16)
        backend.fill(list(zip(regions, sources, strict=True)), progress)
        assert progress.bytes == sum(source.nbytes for source in sources)
        for region, source in zip(regions, sources, strict=True):
            content = os.pread(region.export(), source.nbytes, 0)
            assert content == source.path.read_bytes()[source.offset :]
    except LoaderError as error:
        return error.reason, progress.why_not
    except Exception as error:  # noqa: BLE001 - a worker reports it as InternalError
        return f"{type(error).__name__}: {error}", progress.why_not
    return "loaded", progress.why_not


FILES = {"refused": RefusingDirectFile, "unsupported": UnsupportedDirectFile}


def in_a_child(fault: str, way: str) -> list[str]:
    """Let a `fault` of fake_cuda.c happen in a process of its own; returns what `load` does."""
    checkpoint, mover = map(Path, sys.argv[1:])
    reading_end, writing_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ["FAKE_CUDA_FAIL"] = fault
        reading.is_cached = lambda *_: way != "direct"
        found = native.mover(mover) if way == "compiled" else None
        native.mover = lambda: found
        if "GPUDirect" in way:
            gds.probe = lambda _: gds.Probe(True)
            gds.DirectFile = FILES.get(way.partition(" ")[0], MockedDirectFile)
        os.write(writing_end, json.dumps(load(checkpoint, WAYS[way])).encode())
        os._exit(0)
    os.close(writing_end)
    with os.fdopen(reading_end) as said:
        end: list[str] = json.loads(said.read())
    os.waitpid(child, 0)
    return end


def main() -> None:
    """Print a line for each."""
    faults = [(call, "compiled", code, 0) for code in (OUT_OF_MEMORY, DEFECT) for call in calls()]
    faults.append(("cuModuleLoadData", "compiled", NO_BINARY, 0))
    for call, way, code, nth in (*(("none", way, 0, 0) for way in WAYS), *faults, *ONCE):
        end, why = in_a_child(f"{call}:{code}:{nth}" if nth else f"{call}:{code}", way)
        line = {"call": call, "way": way, "code": code, "nth": nth, "end": end, "why": why}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
