"""The archives in the cache: found by digest, built when missing, one per image kept."""

from __future__ import annotations

import fcntl
import time
from typing import TYPE_CHECKING

from workspace.errors import ToolError
from workspace.paths import cache_directory

from .builders import Builder, choose
from .images import IMAGES, Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


def ensure(
    names: Iterable[str] = tuple(IMAGES), *, report: Callable[[str], None] = print
) -> dict[str, Path]:
    """Return the archive of each named image, built if need be.

    `report` gets one line per image. Two processes wait for each other. Raises ToolError.
    """
    unknown = [name for name in names if name not in IMAGES]
    if unknown:
        raise ToolError(f"image {unknown[0]}: unknown; there are {', '.join(IMAGES)}")
    folder = cache_directory("images")
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder = choose()
        return {name: _ensure_one(IMAGES[name], builder, folder, report) for name in names}


def _ensure_one(
    image: Image, builder: Builder, folder: Path, report: Callable[[str], None]
) -> Path:
    archive = folder / f"{image.name}-{image.digest(base=builder.base)}.tar"
    if archive.exists():
        report(f"image {image.name}: up to date")
        return archive
    began = time.monotonic()
    report(f"image {image.name}: building")
    unfinished = folder / f"{image.name}.part"
    unfinished.unlink(missing_ok=True)
    try:
        builder.build(image, unfinished)
        for old in folder.glob(f"{image.name}-*.tar"):
            old.unlink()
        unfinished.rename(archive)
    finally:
        unfinished.unlink(missing_ok=True)
    seconds, size = time.monotonic() - began, archive.stat().st_size / 1e6
    report(f"image {image.name}: {size:,.0f} MB, built in {seconds:.0f} s")
    return archive
