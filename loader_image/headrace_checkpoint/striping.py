"""Spreads part files over the object storage targets (OSTs) of a Lustre file system.

A Lustre file lies on as many OSTs as its layout says, one unless asked otherwise, and no
reader gets more than theirs. Files take over the layout of their directory when they are
made, so it is set on the empty directory. A checkpoint is as good without, only slower to
load: whatever fails here is a warning. Nothing is done on other file systems.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from headrace_checkpoint.report import log
from headrace_checkpoint.storage import file_system_type

STRIPE_BYTES = 16 * 1024**2
"""Bytes in a row on one OST: a few of the loader's 4 MiB chunks."""

_LUSTRE = 0x0BD00BD0  # LL_SUPER_MAGIC
_SECONDS = 60.0


def set_striping(directory: Path, part_bytes: int) -> int | None:
    """Stripe what will be written in `directory` over all OSTs that a part of that size fills.

    Returns the number of OSTs; None where there is no Lustre or it could not be done, as logged.
    """
    if file_system_type(directory) != _LUSTRE:
        log("striping-skipped", reason="not a Lustre file system")
        return None
    try:
        count = min(_targets(directory), -(-part_bytes // STRIPE_BYTES))
        _lfs("setstripe", "-c", count, "-S", STRIPE_BYTES, directory)
    except (OSError, subprocess.TimeoutExpired) as error:
        _log_failure(error)
        return None
    return count


def check_striping(directory: Path, files: Sequence[str], count: int) -> None:
    """Log whether each file has the layout that was set."""
    paths = [directory / file for file in files]
    try:
        counts, sizes = (
            {int(n) for n in _lfs("getstripe", option, *paths).split()} for option in ("-c", "-S")
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        _log_failure(error)
        return
    if (counts, sizes) != ({count}, {STRIPE_BYTES}):
        _log_failure(
            f"asked for {count} OSTs, files have {sorted(counts)} and sizes {sorted(sizes)}"
        )
        return
    log("striped", stripeCount=count, stripeBytes=STRIPE_BYTES)


def _targets(directory: Path) -> int:
    found = re.findall(r"\[OST:\d+\]", _lfs("df", directory))
    if not found:
        raise OSError("lfs df: names no OST")
    return len(found)


def _lfs(*arguments: object) -> str:
    command = ["lfs", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if result.returncode:
        raise OSError(f"lfs {arguments[0]}: status {result.returncode}: {result.stderr.strip()}")
    return result.stdout


def _log_failure(error: object) -> None:
    log("striping-failed", "warning", error=str(error), fix="see that lfs works in this image")
