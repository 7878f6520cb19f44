"""A proxy in front of an API server that does harm: the network and the server on a bad day.

It listens on plain HTTP at loopback and passes on the bearer token it gets. Each request is
numbered and shown to `harm`, each event of a watch to `events`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import aiohttp
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

_PASSED_ON = ("Authorization", "Content-Type", "Accept", "User-Agent")
# Longer than a client under test waits; the server's end waits for those that hang.
HANG_SECONDS = 8.0
_LIMITS = aiohttp.ClientTimeout(total=None, sock_connect=5)


@dataclass(frozen=True)
class Request:
    """One request; `number` counts all of this proxy's, `write` only those that write."""

    number: int
    write: int | None
    method: str
    path: str
    query: dict[str, str]

    @property
    def is_watch(self) -> bool:
        """Whether it asks for a stream of events."""
        return "watch" in self.query


@dataclass(frozen=True)
class Harm:
    """What happens to a request: whether it is passed on, and what the client gets instead.

    Without a `status` the connection breaks; with `hang` it stays open without an answer.
    `unless` is asked with the API server's answer's status whether the client gets that after all.
    """

    pass_on: bool = False
    status: int | None = None
    message: str = "injected"
    headers: tuple[tuple[str, str], ...] = ()
    hang: bool = False
    unless: Callable[[int], bool] = lambda _: False


REFUSED = Harm()
LOST = Harm(pass_on=True)
HANGING = Harm(pass_on=True, hang=True)


@dataclass
class Proxy:
    """A server on a port of its own; an asynchronous context manager."""

    server: str
    authority: Path
    harm: Callable[[Request], Harm | None] = lambda _: None
    events: Callable[[Request, dict[str, Any]], Awaitable[list[dict[str, Any]]]] | None = None
    is_dead: bool = False
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    _writes: int = 0
    _watches: set[asyncio.Task[Any]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context(cafile=str(self.authority))
        self._session = aiohttp.ClientSession(
            # Each watch holds a connection; waiting for a free one would look like a dead server.
            connector=aiohttp.TCPConnector(ssl=context, limit=0),
            timeout=_LIMITS,
            read_bufsize=2**21,
        )
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", self._handle)
        # A handler of a client that is gone is cancelled. aiohttp takes a timeout of 0 for none.
        self._runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        await self._runner.cleanup()
        await self._session.close()

    def cut(self) -> None:
        """Break all watches."""
        for task in self._watches:
            task.cancel()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        """Answer; a watch ends with its client, anything else is finished without it."""
        answering = asyncio.ensure_future(self._answer(request))
        if "watch" not in request.query:
            return await asyncio.shield(answering)
        self._watches.add(answering)
        try:
            return await answering
        finally:
            answering.cancel()
            self._watches.discard(answering)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        is_write = request.method != "GET"
        seen = Request(
            len(self.requests),
            self._writes if is_write else None,
            request.method,
            request.path,
            dict(request.query),
        )
        if self.is_dead:
            return _broken(request)
        self.requests.append(seen)
        self._writes += is_write
        harm = self.harm(seen)
        if harm is not None:
            return await self._do_harm(request, harm)
        try:
            return await self._pass_on(request, seen)
        except (aiohttp.ClientError, OSError):
            return _broken(request)

    async def _do_harm(self, request: web.Request, harm: Harm) -> web.StreamResponse:
        if harm.pass_on:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self._upstream(request, await request.read()) as answer:
                    content = await answer.read()
                if harm.unless(answer.status):
                    return web.Response(body=content, status=answer.status, headers=_kept(answer))
        if harm.hang:
            await asyncio.sleep(HANG_SECONDS)
        if harm.status is None:
            return _broken(request)
        body = {"kind": "Status", "status": "Failure", "message": harm.message}
        return web.json_response(
            {**body, "code": harm.status}, status=harm.status, headers=dict(harm.headers)
        )

    def _upstream(self, request: web.Request, body: bytes) -> Any:
        headers = {k: request.headers[k] for k in _PASSED_ON if k in request.headers}
        url = self.server + str(request.rel_url)
        return self._session.request(request.method, url, data=body, headers=headers)

    async def _pass_on(self, request: web.Request, seen: Request) -> web.StreamResponse:
        async with self._upstream(request, await request.read()) as answer:
            kept = _kept(answer)
            if not seen.is_watch or answer.status != 200:
                return web.Response(body=await answer.read(), status=answer.status, headers=kept)
            response = web.StreamResponse(status=200, headers=kept)
            await response.prepare(request)
            await self._stream(answer, response, seen)
            return _broken(request)

    async def _stream(
        self, answer: aiohttp.ClientResponse, response: web.StreamResponse, seen: Request
    ) -> None:
        async for line in answer.content:
            if self.is_dead:
                return
            if self.events is None:
                await response.write(line)
                continue
            for event in await self.events(seen, json.loads(line)):
                await response.write(json.dumps(event).encode() + b"\n")


def _kept(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {k: v for k, v in answer.headers.items() if k in ("Content-Type", "Retry-After")}


def _broken(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
