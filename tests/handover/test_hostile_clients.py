"""Clients that misbehave: refused, bounded, and the server serves the next one."""

import contextlib
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace_handover import AttachTimeout, attach
from headrace_handover.messages import (
    MAX_REQUEST_BYTES,
    Failure,
    Ready,
    Region,
    Request,
    Tensor,
    decode_reply,
    grouped,
)
from headrace_handover.server import HandoverServer, Offer

pytestmark = pytest.mark.usefixtures("no_leak")


@contextlib.contextmanager
def connected(server: HandoverServer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(server.path))
        yield sock


def read_all(sock: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):  # the server closed with our bytes unread
        while data := sock.recv(65536):
            received += data
    return received


def assert_serves(server: HandoverServer) -> None:
    with attach(server.path, rank=0, device="host", timeout=10) as attachment:
        assert len(attachment.regions) == 1


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=300))
def test_garbage(server: HandoverServer, garbage: bytes) -> None:
    with connected(server) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(garbage + b"\n")
        answer = read_all(sock)
    if answer:
        reply = decode_reply(answer.rstrip(b"\n"))
        assert isinstance(reply, Failure)
        assert reply.reason == "ProtocolViolation"
    assert_serves(server)


def test_half_a_request_is_given_up(server: HandoverServer) -> None:
    begin = time.monotonic()
    with connected(server) as sock:
        sock.sendall(Request(0, "host").encode()[:10])
        assert read_all(sock) == b""
    assert 0.4 < time.monotonic() - begin < 5
    assert_serves(server)


def test_a_request_dripping_in_is_given_up(server: HandoverServer) -> None:
    begin = time.monotonic()
    with connected(server) as sock, contextlib.suppress(BrokenPipeError):
        for byte in Request(0, "host").encode():
            sock.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - begin < 5
    assert_serves(server)


def test_an_endless_line_is_refused(server: HandoverServer) -> None:
    with connected(server) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"x" * (MAX_REQUEST_BYTES * 50))
        answer = read_all(sock)
    assert answer == b"" or b"ProtocolViolation" in answer
    assert_serves(server)


def test_hanging_up_at_once(server: HandoverServer) -> None:
    for _ in range(50):
        with connected(server):
            pass
    assert_serves(server)


def test_descriptors_sent_to_the_server_are_dropped(
    server: HandoverServer, descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    with connected(server) as sock:
        socket.send_fds(sock, [Request(0, "host").encode()], [0] * 50)
        assert b'"ready"' in sock.recv(65536)
        # the server runs in this process: its side would show here
        assert descriptors() <= before + 4


def test_talking_after_the_request_ends_the_lease(server: HandoverServer, source: Any) -> None:
    with connected(server) as sock:
        sock.sendall(Request(0, "host").encode())
        source.until(lambda: len(source.peers) == 1)
        sock.sendall(b"more\n")
        source.until(lambda: not source.peers)
    assert_serves(server)


def test_a_client_that_never_reads_is_dropped(server: HandoverServer, source: Any) -> None:
    many = grouped(Tensor(f"{index:0100}", "U8", (0,), 0, 0) for index in range(20000))
    ready = Ready(0, "c", (Region(0, 4096, 4096, many),))
    source.set(Offer(ready, source.offer.descriptors))
    with connected(server) as sock:
        sock.sendall(Request(0, "host").encode())
        time.sleep(2.5)  # longer than the server's send_seconds
        with connected(server) as other:
            other.sendall(Request(0, "host").encode())
            assert other.recv(10) == b'{"status":'
        # What the kernel took before the server gave up, and no more.
        assert 0 < len(read_all(sock)) < len(ready.encode())


def test_connections_beyond_the_limit_are_refused_until_one_ends(
    server: HandoverServer, source: Any
) -> None:
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(attach(server.path, rank=0, device="host", timeout=10))
            for _ in range(4)
        ]
        with connected(server) as sock:
            assert b"TooManyConnections" in read_all(sock)
        with pytest.raises(AttachTimeout, match="TooManyConnections"):
            attach(server.path, rank=0, device="host", timeout=0.3)
        held[0].close()
        assert_serves(server)


def test_thousands_of_connections(server: HandoverServer, source: Any) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = 3000 if limit > 3500 else limit // 2
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(str(server.path))
            assert threading.active_count() <= before + 4  # connections that are served at a time
        sock.settimeout(10)
        assert b"TooManyConnections" in read_all(sock)
    assert_serves(server)


def test_a_server_out_of_descriptors_recovers(tmp_path: Any) -> None:
    script = (
        "import os, resource, sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; import importlib.util as u\n"
        "spec = u.spec_from_file_location('c', sys.argv[2] + '/conftest.py')\n"
        "c = u.module_from_spec(spec); spec.loader.exec_module(c)\n"
        "server = c.HandoverServer(Path(sys.argv[1]), c.Source(), c.LIMITS)\n"
        "free = os.dup(0); os.close(free)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, free + 2))\n"
        "server.start(); print('up', flush=True); time.sleep(60)\n"
    )
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", script, str(tmp_path), here]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        path = tmp_path / "handover.sock"
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                sock.settimeout(10)
                sock.connect(str(path))
            time.sleep(0.3)
        with attach(path, rank=0, device="host", timeout=20) as attachment:
            assert len(attachment.regions) == 1
        process.kill()
