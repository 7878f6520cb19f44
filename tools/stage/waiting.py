"""Waiting for what is to come, and ports that nobody listens on."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_SECONDS = 40.0
T = TypeVar("T")


def eventually(check: Callable[[], T | None], what: str, seconds: float = WAIT_SECONDS) -> T:
    """Return the first true result of a check; AssertionErrors of the check count as not yet."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = result = check()
            if result:
                return result
        except AssertionError as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s; last: {last}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
