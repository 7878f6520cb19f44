"""What loaders tell of themselves: asked over HTTP at the addresses of their pods.

Kubernetes has no field for it, and a loader has no credentials to write one. A loader that
does not answer costs a bounded wait and leaves its path unknown.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import aiohttp

from headrace_operator.api.parts import LOADER_PORT
from headrace_operator.plan.objects import at, text
from headrace_operator.plan.serving import LoaderAddress
from headrace_operator.plan.world import LoadedPath

_ANSWER_SECONDS = 2.0
# How long the one who asks first waits for the answer. Those that nobody can reach, because a
# NetworkPolicy is in the way, may be thousands.
_PATIENCE_SECONDS = 0.5
_ASK_AGAIN_SECONDS = 30.0
_MAX_ANSWER_BYTES = 1 << 20
_MAX_REMEMBERED = 1 << 15  # more than there are, or all are asked again and again
_UNREACHABLE = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class Loaders:
    """Asks each loader once; those that gave no answer again after half a minute.

    Remembering spares requests and nothing else: the path of a load that is over cannot
    change, and a loader that starts again has a new container ID.
    """

    def __init__(self, port: int = LOADER_PORT) -> None:
        self._port = port
        self._told: dict[str, LoadedPath] = {}
        self._silent_until: dict[str, float] = {}
        self._asking: set[asyncio.Task[None]] = set()

    async def paths(
        self, loaders: Iterable[LoaderAddress], notify: Callable[[], None] = lambda: None
    ) -> Mapping[str, LoadedPath]:
        """Return the paths by pod UID, of the loaders that have told theirs.

        Those asked before are asked behind the caller's back; `notify` is called when one of
        them, or one that took its time, has told.
        """
        loaders = tuple(loaders)
        now = time.monotonic()
        unknown = [
            loader
            for loader in loaders
            if loader.container_id not in self._told
            and self._silent_until.get(loader.container_id, 0.0) <= now
        ]
        if unknown:
            is_first = any(loader.container_id not in self._silent_until for loader in unknown)
            for loader in unknown:
                _remember(self._silent_until, loader, now + _ASK_AGAIN_SECONDS)
            asking = asyncio.create_task(self._ask_all(unknown))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            seconds = _PATIENCE_SECONDS if is_first else 0
            _, late = await asyncio.wait([asking], timeout=seconds)
            if late:
                asking.add_done_callback(lambda _: self._tell(unknown, notify))
        return {
            loader.pod_uid: self._told[loader.container_id]
            for loader in loaders
            if loader.container_id in self._told
        }

    def _tell(self, loaders: Iterable[LoaderAddress], notify: Callable[[], None]) -> None:
        if any(loader.container_id in self._told for loader in loaders):
            notify()

    async def _ask_all(self, loaders: list[LoaderAddress]) -> None:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(self._ask(session, loader) for loader in loaders))

    async def _ask(self, session: aiohttp.ClientSession, loader: LoaderAddress) -> None:
        host = f"[{loader.ip}]" if ":" in loader.ip else loader.ip
        url = f"http://{host}:{self._port}/v1/status"
        try:
            async with session.get(url, allow_redirects=False, raise_for_status=True) as response:
                answer = await response.content.read(_MAX_ANSWER_BYTES)
                path = _path(json.loads(answer))
        except _UNREACHABLE:
            return
        if path is not None:
            _remember(self._told, loader, path)


def _remember(known: dict[str, Any], loader: LoaderAddress, value: object) -> None:
    known[loader.container_id] = value
    while len(known) > _MAX_REMEMBERED:
        del known[next(iter(known))]


def _path(status: object) -> LoadedPath | None:
    """Read the path from a status document; None while it is not decided."""
    active = at(status, "directPath", "active")
    if not isinstance(active, bool):
        return None
    reason, message = (text(status, "directPath", key) for key in ("reason", "message"))
    return LoadedPath(active, reason, message)
