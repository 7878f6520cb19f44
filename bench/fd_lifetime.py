"""Does a file descriptor alone keep GPU memory alive?

The loader's supervisor wants to hold the weights without a CUDA context: a
worker process per GPU allocates, fills, exports the allocation as a POSIX file
descriptor, passes it to the supervisor over a unix socket and exits. This bench
shows on a real GPU whether the memory and its content outlive the worker while
nothing but the descriptor is open, how long a new process takes to map it
read-only, and that a write through such a mapping fails.

    python bench/fd_lifetime.py --gib 8 --output bench/results/fd_lifetime.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

PATTERN = 0x5A17C0DE
GIB = 1 << 30


class Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class AllocFlags(ctypes.Structure):
    _fields_ = [
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class AllocationProp(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", Location),
        ("win32", ctypes.c_void_p),
        ("allocFlags", AllocFlags),
    ]


class AccessDesc(ctypes.Structure):
    _fields_ = [("location", Location), ("flags", ctypes.c_int)]


POSIX_FD, PINNED, DEVICE, READ, READWRITE = 1, 1, 1, 1, 3


class Cuda:
    """The few driver calls needed, each checked."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self("cuDeviceGet", ctypes.byref(device), 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *args: object) -> None:
        rc = getattr(self.lib, name)(*args)
        if rc:
            raise OSError(rc, f"{name} returned {rc}")

    def map(self, handle: ctypes.c_ulonglong, size: int, flags: int) -> ctypes.c_ulonglong:
        pointer = ctypes.c_ulonglong()
        self(
            "cuMemAddressReserve",
            ctypes.byref(pointer),
            ctypes.c_size_t(size),
            ctypes.c_size_t(0),
            ctypes.c_ulonglong(0),
            ctypes.c_ulonglong(0),
        )
        self(
            "cuMemMap",
            pointer,
            ctypes.c_size_t(size),
            ctypes.c_size_t(0),
            handle,
            ctypes.c_ulonglong(0),
        )
        access = AccessDesc(Location(DEVICE, 0), flags)
        self(
            "cuMemSetAccess",
            pointer,
            ctypes.c_size_t(size),
            ctypes.byref(access),
            ctypes.c_size_t(1),
        )
        return pointer


def worker(sock: socket.socket, size: int) -> None:
    cuda = Cuda()
    prop = AllocationProp(PINNED, POSIX_FD, Location(DEVICE, 0), None, AllocFlags(0, 1, 0))
    handle, fd = ctypes.c_ulonglong(), ctypes.c_int()
    cuda(
        "cuMemCreate",
        ctypes.byref(handle),
        ctypes.c_size_t(size),
        ctypes.byref(prop),
        ctypes.c_ulonglong(0),
    )
    pointer = cuda.map(handle, size, READWRITE)
    cuda("cuMemsetD32_v2", pointer, ctypes.c_uint(PATTERN), ctypes.c_size_t(size // 4))
    cuda("cuCtxSynchronize")
    cuda("cuMemExportToShareableHandle", ctypes.byref(fd), handle, POSIX_FD, ctypes.c_ulonglong(0))
    socket.send_fds(sock, [b"x"], [fd.value])


def reader(fd: int, size: int) -> None:
    begin = time.perf_counter()
    cuda = Cuda()
    context = time.perf_counter()
    handle = ctypes.c_ulonglong()
    cuda("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), POSIX_FD)
    pointer = cuda.map(handle, size, READ)
    mapped = time.perf_counter()
    bad = 0
    block = 64 << 20
    host = (ctypes.c_uint * (block // 4))()
    expected = bytes(ctypes.c_uint(PATTERN)) * (block // 4)
    for offset in range(0, size, block):
        cuda(
            "cuMemcpyDtoH_v2",
            host,
            ctypes.c_ulonglong(pointer.value + offset),
            ctypes.c_size_t(block),
        )
        bad += bytes(host) != expected
    write = cuda.lib.cuMemsetD32_v2(pointer, ctypes.c_uint(0), ctypes.c_size_t(1024))
    write = write or cuda.lib.cuCtxSynchronize()
    print(
        json.dumps(
            {
                "context_s": round(context - begin, 4),
                "import_and_map_s": round(mapped - context, 4),
                "blocks_wrong": bad,
                "write_through_read_only_mapping_rc": write,
            }
        )
    )


def used_mib() -> int:
    out = subprocess.run(
        ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return int(out.stdout.split()[0])


def spawn(*args: str, fds: tuple[int, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, *args],
        pass_fds=fds,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=int)
    parser.add_argument("--reader", type=int)
    args = parser.parse_args()
    size = args.gib * GIB
    if args.worker is not None:
        worker(socket.socket(fileno=args.worker), size)
        return
    if args.reader is not None:
        reader(args.reader, size)
        return
    result: dict[str, object] = {"gib": args.gib, "used_before_mib": used_mib()}
    ours, theirs = socket.socketpair()
    done = spawn("--gib", str(args.gib), "--worker", str(theirs.fileno()), fds=(theirs.fileno(),))
    result["worker_rc"], result["worker_stderr"] = done.returncode, done.stderr[-500:]
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    result["used_worker_gone_fd_open_mib"] = used_mib()
    readers = []
    for _ in range(3):
        out = spawn("--gib", str(args.gib), "--reader", str(fds[0]), fds=(fds[0],))
        readers.append(json.loads(out.stdout) if out.returncode == 0 else out.stderr[-500:])
    result["readers"] = readers
    result["used_after_readers_mib"] = used_mib()
    os.close(fds[0])
    time.sleep(1)
    result["used_fd_closed_mib"] = used_mib()
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
