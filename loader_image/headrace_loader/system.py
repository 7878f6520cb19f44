"""What the loader asks the kernel about itself: its start, memory and CPUs, whether it ran out."""

import os
import resource
import time
from pathlib import Path

from headrace_loader.errors import OutOfMemory

_CGROUP = Path("/sys/fs/cgroup")
_START_TIME_FIELD = 19  # of /proc/self/stat, counted after the command's closing parenthesis


def process_start_time() -> float:
    """Unix time at which this process was started, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot = int(fields[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


def allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one: each part of each rank takes one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_memory(needed: int) -> None:
    """Raise OutOfMemory where `needed` bytes of host memory can never be had.

    The kernel would answer with SIGKILL in the middle of the load.
    """
    limit = _memory_limit()
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit is not None and needed > limit:
        raise OutOfMemory(
            f"{needed} bytes of weights: the container's memory limit is {limit}; raise "
            "spec.loading.resources.limits.memory above the weights"
        )
    if needed > total:
        raise OutOfMemory(f"{needed} bytes of weights: the node has {total} bytes of memory")


def oom_kills() -> int:
    """How many processes of this container the kernel has killed for memory; 0 if unknown."""
    try:
        lines = (_CGROUP / "memory.events").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return int(counts.get("oom_kill", 0))


def usable_cpus() -> int:
    """How many CPUs this process may keep busy: those it may run on, or the container's limit.

    Source: Documentation/admin-guide/cgroup-v2, cpu.max; cgroup-v1's cpu.cfs_quota_us.
    """
    mine = len(os.sched_getaffinity(0))
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            fields = [word for name in names for word in (_CGROUP / name).read_text().split()]
            quota, period = map(int, fields)
        except (OSError, ValueError):  # another version, or "max"
            continue
        if quota > 0:
            return max(1, min(mine, -(-quota // period)))
    return mine


def _memory_limit() -> int | None:
    try:
        text = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)
