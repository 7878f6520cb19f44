"""Starts a worker: `python -m headrace_loader.worker_main`, run by the supervisor.

Opening a GPU takes longer than all else, so it begins before the rest is imported.
"""

import contextlib
import sys


def _begin_to_open(local_rank: int) -> None:
    with contextlib.suppress(Exception):  # met again, and reported, where it is needed
        from headrace_loader.cuda.opening import opening

        opening(local_rank)


def main() -> int:
    """Load one rank; returns the exit code."""
    options = dict(item.removeprefix("--").split("=", 1) for item in sys.argv[1:])
    rank = int(options["rank"])
    if options["backend"] == "cuda":
        _begin_to_open(rank)

    from headrace_loader.backends import BackendOptions, PathPolicy
    from headrace_loader.worker import run

    threads, cpus = int(options["read-threads"]), int(options["cpus"])
    told = BackendOptions(rank, PathPolicy(options["path"]), threads, cpus)
    return run(int(options["socket"]), options["backend"], told)


if __name__ == "__main__":
    sys.exit(main())
