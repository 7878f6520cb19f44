"""Where weights go, what attaching to them costs, and the limits that rates are compared with."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from headrace_handover import attach

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
GIB = 1 << 30
PIECE = 4 << 20


class NotMeasuredError(Exception):
    """Why there is no number."""


class HostTarget:
    """Memory of this machine; the limit is reading the same files into fixed buffers."""

    name = "host"
    device = "host"
    peer_device = "cpu"

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def attach_ms(self, path: Path) -> float:
        """Connect, receive the descriptors and map all regions read-only."""
        begin = time.perf_counter()
        with attach(path, rank=0, device=self.device, timeout=60) as weights:
            mapped = [
                mmap.mmap(item.descriptor, item.region.nbytes, prot=mmap.PROT_READ)
                for item in weights.regions
            ]
            elapsed = time.perf_counter() - begin
            for mapping in mapped:
                mapping.close()
        return elapsed * 1000

    def limit(self, directory: Path) -> float:
        return read_rate(directory, self._threads, direct=False)

    def pinned_bytes(self) -> int:
        return 0


class CudaTarget:
    """One GPU, or one for each of several ranks, of which the first is attached to."""

    name = "cuda"
    peer_device = "cuda:0"

    def __init__(self, threads: int, ranks: int) -> None:
        import gpu
        from headrace_loader.cuda.driver import Device

        self._threads = threads
        self._gpu = gpu
        self._device = Device()
        self.device = self._device.uuid
        self._link = gpu.Link(self._device) if ranks == 1 else Links(ranks)
        self._ranks = ranks

    def attach_ms(self, path: Path) -> float:
        """Connect, receive the descriptors and map all regions read-only."""
        free = self._device.free_bytes()
        begin = time.perf_counter()
        with attach(path, rank=0, device=self.device, timeout=60) as weights:
            mapped = [
                self._gpu.map_read_only(self._device, item.descriptor, item.region.nbytes)
                for item in weights.regions
            ]
            elapsed = time.perf_counter() - begin
            if (taken := free - self._device.free_bytes()) > 64 << 20:
                raise SystemExit(f"attaching took {taken} bytes of GPU memory: must be none")
            for allocation in mapped:
                allocation.release()
        return elapsed * 1000

    def limit(self, directory: Path) -> float:
        nbytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        return float(self._link.rate(nbytes))

    def pinned_bytes(self) -> int:
        from headrace_loader.cuda.lanes import pinned_bytes

        return pinned_bytes(self._threads) * self._ranks


class Links:
    """The links of several GPUs, all copied over at once, by a process each as ranks are."""

    def __init__(self, count: int) -> None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        visible = list(map(str, range(count))) if named is None else named.split(",")
        if len(visible) < count:
            raise NotMeasuredError(f"--ranks {count}: CUDA_VISIBLE_DEVICES={named} are fewer GPUs")
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "gpu.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": device},
            )
            for device in visible[:count]
        ]
        for number, process in enumerate(self._processes):
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise NotMeasuredError(f"--ranks {count}: GPU {visible[number]} cannot be used")

    def rate(self, nbytes: int) -> float:
        """Copy `nbytes` in all, and return GiB/s over all: as slow as the slowest."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{nbytes // len(self._processes)}\n")
            process.stdin.flush()
        return min(float(p.stdout.readline()) for p in self._processes if p.stdout) * len(
            self._processes
        )


def open_target(name: str | None, threads: int, ranks: int) -> HostTarget | CudaTarget:
    if name == "host":
        return HostTarget(threads * ranks)
    try:
        return CudaTarget(threads, ranks)
    except Exception as error:  # noqa: BLE001 - whatever keeps this GPU from working
        if name == "cuda":
            raise SystemExit(f"--backend cuda: {error}; use --backend host") from None
        print(f"no GPU here ({error}): backend host", file=sys.stderr, flush=True)
        return HostTarget(threads * ranks)


def engine_attach_ms(path: Path, device: str) -> tuple[float, float] | None:
    """Attach as an engine does, then ask for every tensor; None without torch."""
    try:
        from headrace_engine import attach as attach_by_torch
    except ImportError:
        return None
    begin = time.perf_counter()
    weights = attach_by_torch(path, device=device, timeout=60)
    attached = time.perf_counter()
    tensors = list(weights.values())
    made = time.perf_counter()
    weights.attachment.close()
    del tensors
    return (attached - begin) * 1000, (made - attached) * 1000


def read_rate(directory: Path, threads: int, *, direct: bool) -> float:
    """GiB/s of `threads` threads that read all parts in order into a buffer each.

    Raises NotMeasuredError where the file system has no direct reads.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    try:
        files = [os.open(path, flags) for path in sorted(directory.glob("*.safetensors"))]
    except OSError as error:
        raise NotMeasuredError(error.strerror) from None
    sizes = [os.fstat(file).st_size for file in files]
    work = iter(
        [(f, offset) for f, n in zip(files, sizes, strict=True) for offset in range(0, n, PIECE)]
    )
    lock = threading.Lock()

    def read() -> None:
        buffer = mmap.mmap(-1, PIECE)
        while True:
            with lock:
                item = next(work, None)
            if item is None:
                return
            os.preadv(item[0], [buffer], item[1])

    running = [threading.Thread(target=read) for _ in range(threads)]
    begin = time.perf_counter()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    elapsed = time.perf_counter() - begin
    for file in files:
        os.close(file)
    return sum(sizes) / GIB / elapsed


def fio_rate(directory: Path, threads: int) -> float:
    """GiB/s of fio's sequential O_DIRECT read of all parts at once, each with as many reads.

    The better of two ways: one reader with a queue, and a reader for each share of a file.
    Raises NotMeasuredError.
    """
    parts = sorted(directory.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in parts)
    with ThreadPoolExecutor(len(parts)) as pool:
        ways = (_queued(threads), _shared(threads))
        return total / GIB / min(max(pool.map(way, parts)) for way in ways)


def _queued(depth: int) -> Callable[[Path], float]:
    return lambda path: _fio(path, "--ioengine=libaio", f"--iodepth={depth}")


def _shared(jobs: int) -> Callable[[Path], float]:
    def read(path: Path) -> float:
        # Never beyond the end: fio makes a file larger that is too small.
        size = path.stat().st_size
        share = min(max(size // jobs // PIECE, 1) * PIECE, size)
        shares = (f"--size={share}", f"--offset_increment={share}")
        readers = min(jobs, size // share)
        return _fio(path, "--ioengine=psync", f"--numjobs={readers}", "--thread", *shares)

    return read


def _fio(path: Path, *options: str) -> float:
    """Return the seconds that it takes to read a file to its end; raises NotMeasuredError."""
    command = [
        *("fio", "--name=cold", f"--filename={path}", "--rw=read", "--direct=1", "--bs=4M"),
        *("--group_reporting", "--output-format=json", *options),
    ]
    try:
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        read = json.loads(out.stdout[out.stdout.index("{") :])["jobs"][0]["read"]
        return float(path.stat().st_size / read["io_bytes"] * read["runtime"] / 1000)
    except subprocess.CalledProcessError as error:
        raise NotMeasuredError(f"fio: {(error.stderr or error.stdout)[-500:].strip()}") from None
    except (
        OSError,
        subprocess.TimeoutExpired,
        ValueError,
        LookupError,
        ZeroDivisionError,
    ) as error:
        raise NotMeasuredError(f"fio: {type(error).__name__}: {error}") from None


def drop_cache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
