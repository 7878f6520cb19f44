"""Asking loaders for their path: a real loader, and addresses where none answers."""

import asyncio
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace_operator.cluster.loaders import Loaders
from headrace_operator.plan.serving import LoaderAddress
from headrace_operator.plan.world import LoadedPath

Serve = Callable[[bytes], tuple[int, list[str]]]


def at(ip: str = "127.0.0.1", container: str = "containerd://1") -> LoaderAddress:
    return LoaderAddress("uid", container, ip)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Answer every request with the given bytes; returns the port and the paths asked for."""
    servers = []

    def start(answer: bytes) -> tuple[int, list[str]]:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        servers.append(server)
        return server.server_port, asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


async def test_a_real_loader_tells_that_it_fell_back(support: Any, tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = support.LoaderProcess(tmp_path / "loader", tmp_path / "checkpoint", "--path", "Prefer")
    try:
        loader.until_phase("Ready")
        (path,) = (await Loaders(loader.port).paths([at()])).values()
    finally:
        loader.close()
    assert path == LoadedPath(False, "HostBackend", "host memory has no GPUDirect path")


async def test_a_path_is_asked_for_once_per_container(serve: Serve) -> None:
    told = {"directPath": {"active": True, "reason": "", "message": ""}}
    port, asked = serve(json.dumps(told).encode())
    loaders = Loaders(port)
    for _ in range(3):
        assert await loaders.paths([at()]) == {"uid": LoadedPath(True, "", "")}
    assert asked == ["/v1/status"]
    await loaders.paths([at(container="containerd://2")])
    assert len(asked) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no JSON",
        b"[]",
        b"{}",
        b'{"directPath": 1}',
        b'{"directPath": {"active": null}}',
        b'"' + b"x" * (2 << 20) + b'"',
    ],
)
async def test_an_answer_that_does_not_tell_is_no_answer(serve: Serve, answer: bytes) -> None:
    port, asked = serve(answer)
    loaders = Loaders(port)
    for _ in range(3):  # and is not asked for again at once
        assert await loaders.paths([at()]) == {}
    assert len(asked) == 1


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "not an address"])
async def test_nobody_there(ip: str) -> None:
    assert await Loaders(9).paths([at(ip)]) == {}


async def test_a_loader_that_does_not_answer_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands may be behind a NetworkPolicy; whoever asks is called when one has told."""
    monkeypatch.setattr("headrace_operator.cluster.loaders._PATIENCE_SECONDS", 0)
    may_answer, told = asyncio.Event(), asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_answer.wait()
        body = b'{"directPath": {"active": true, "reason": "", "message": ""}}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        loaders = Loaders(server.sockets[0].getsockname()[1])
        for _ in range(2):
            assert await loaders.paths([at()], told.set) == {}
        assert not told.is_set()
        may_answer.set()
        await told.wait()
        assert await loaders.paths([at()]) == {"uid": LoadedPath(True, "", "")}
