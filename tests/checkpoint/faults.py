"""Breaks a sharding process at its n-th change of the volume: a script of its own.

    python faults.py SOURCE DIRECTORY kill|errors

For n = 1, 2, ... a forked child shards SOURCE into DIRECTORY/n/checkpoint; just before its
n-th system call that changes the volume, or halfway into it where that is a write, it is killed
by SIGKILL, or that call fails with EIO or ENOSPC. A second child then runs undisturbed. Prints one
line of JSON per n, until a first child ends undisturbed: how both ended, how many parts the
second took over, and what lay on the volume after each. The system calls are real except for the
one that is made to fail.
"""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from headrace_checkpoint import cli

CALLS = ("open", "mkdir", "pwrite", "fsync", "rename", "unlink", "rmdir")


def arm(position: int, fault: str) -> None:
    """Let the n-th of CALLS, counted over all threads, be the last or fail."""
    lock = threading.Lock()
    count = 0

    def wrap(call):
        def wrapped(*arguments, **options):
            nonlocal count
            if call is real_open and not arguments[1] & os.O_CREAT:
                return call(*arguments, **options)
            with lock:
                count += 1
                now = count == position
            if now and call is real_pwrite:
                fd, data, offset = arguments
                with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as same:  # noqa: PTH123
                    real_pwrite(same.fileno(), data[: len(data) // 2], offset)
            if now and fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if now:
                code = (errno.EIO, errno.ENOSPC)[position % 2]
                raise OSError(code, os.strerror(code))
            return call(*arguments, **options)

        return wrapped

    real_open, real_pwrite = os.open, os.pwrite
    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def run(source: str, output: Path, arming: tuple[int, str] | None, log: Path) -> int:
    """Shard in a forked child; returns its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            if arming:
                arm(*arming)
            arguments = ["shard", "--source", source, "--output", str(output)]
            arguments += ["--tensor-parallel-size", "2", "--part-bytes", "200000"]
            with log.open("w") as file, contextlib.redirect_stdout(file):
                os._exit(cli.main(arguments))
        finally:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(directory: Path) -> dict:
    """What is on the volume: is the checkpoint there and sound, and what else."""
    checkpoint = directory / "checkpoint"
    leftovers = sorted(p.name for p in directory.iterdir() if p != checkpoint)
    if not checkpoint.exists():
        return {"published": False, "sound": None, "leftovers": leftovers}
    with contextlib.redirect_stdout(io.StringIO()):
        sound = cli.main(["verify", str(checkpoint)]) == 0
    return {"published": True, "sound": sound, "leftovers": leftovers}


def resumed(log: Path) -> int:
    """How many parts were taken over from the writer before."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return sum(event["parts"] for event in events if event["event"] == "resumed")


def main() -> None:
    source, root, fault = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    os.environ["HEADRACE_TERMINATION_LOG"] = "/absent/termination-log"
    log = root / "log"
    for position in range(1, 1000):
        directory = root / str(position)
        directory.mkdir()
        first = run(source, directory / "checkpoint", (position, fault), log)
        report = {"first": first, "after_first": state(directory)}
        report["second"] = run(source, directory / "checkpoint", None, log)
        report["resumed"] = resumed(log)
        report["after_second"] = state(directory)
        sys.stdout.write(json.dumps(report) + "\n")
        if first == 0 and not report["after_first"]["leftovers"]:
            return


if __name__ == "__main__":
    main()
