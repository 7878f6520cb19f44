"""Starting components and waiting for them, with an error that quotes the log of a dead one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from . import processes
from .errors import ComponentError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .layout import Layout

T = TypeVar("T")
POLL_SECONDS = 0.05


class Components:
    """The processes that this Python process started for one cluster."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        component: str,
        command: Sequence[str | Path],
        descriptors: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start `component` in the background, with open file `descriptors` to hold."""
        process = processes.spawn(
            component,
            command,
            owner=self._layout.root,
            log=self._layout.log(component),
            descriptors=descriptors,
        )
        self._started[component] = process
        return process

    def wait_for(self, what: str, condition: Callable[[], T | None], seconds: float) -> T:
        """Wait until `condition` returns something true, and return that.

        Raises ComponentError when a started component exits meanwhile, or after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            for component, process in self._started.items():
                if process.poll() is not None:
                    raise ComponentError(self._describe(component, f"exited while {what}"))
            if time.monotonic() > deadline:
                last = next(reversed(self._started))
                raise ComponentError(self._describe(last, f"{seconds:.0f} s passed while {what}"))
            time.sleep(POLL_SECONDS)
        return value

    def reap(self) -> None:
        """Collect the exit statuses of the processes after they were killed."""
        for process in self._started.values():
            process.wait()
        self._started.clear()

    def forget(self, component: str) -> None:
        """Collect the exit status of `component`, which has exited."""
        self._started.pop(component).wait()

    def _describe(self, component: str, event: str) -> str:
        return (
            f"{component}: {event}; last lines of {self._layout.log(component)}:\n"
            f"{self._layout.log_tail(component)}"
        )
