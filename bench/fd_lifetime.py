"""Does a file descriptor alone keep GPU memory alive?

The loader's supervisor wants to hold the weights without a CUDA context: a
worker process per GPU allocates, fills, exports the allocation as a POSIX file
descriptor, passes it to the supervisor over a unix socket and exits. This bench
shows on a real GPU whether the memory and its content outlive the worker while
nothing but the descriptor is open, how long a new process takes to map it
read-only, and that a write through such a mapping fails.

    PYTHONPATH=loader_image python bench/fd_lifetime.py --gib 8 --output FILE
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

from gpu import content, map_read_only
from headrace_loader.cuda.driver import CudaError, Device, bind, u64

PATTERN = 0x5A17C0DE
GIB = 1 << 30
BLOCK = 64 << 20

_fill = bind("cuMemsetD32_v2", u64, ctypes.c_uint, ctypes.c_size_t)
_synchronize = bind("cuCtxSynchronize")


def worker(sock: socket.socket, size: int) -> None:
    allocation = Device().allocate(size)
    _fill(allocation.pointer, PATTERN, size // 4)
    _synchronize()
    socket.send_fds(sock, [b"x"], [allocation.export()])


def reader(fd: int, size: int) -> None:
    begin = time.perf_counter()
    device = Device()
    context = time.perf_counter()
    mapping = map_read_only(device, fd, size)
    mapped = time.perf_counter()
    expected = PATTERN.to_bytes(4, "little") * (BLOCK // 4)
    bad = sum(
        content(mapping.pointer + offset, BLOCK) != expected for offset in range(0, size, BLOCK)
    )
    try:
        _fill(mapping.pointer, 0, 1024)
        _synchronize()
        write = "done"
    except CudaError as error:
        write = str(error)
    result = {
        "context_s": round(context - begin, 4),
        "import_and_map_s": round(mapped - context, 4),
        "blocks_wrong": bad,
        "write_through_read_only_mapping": write,
    }
    print(json.dumps(result))


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
