"""Attaching to a real server: descriptors, lease, progress, refusals, time limits."""

import fcntl
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from headrace_handover import (
    AttachTimeout,
    LoaderUnreachable,
    Loading,
    ProtocolViolation,
    Refused,
    Tensor,
    attach,
)
from headrace_handover.errors import HandoverError
from headrace_handover.messages import MAX_REGIONS, Failure, Ready, Region, grouped
from headrace_handover.server import HandoverServer, Limits, Offer

pytestmark = pytest.mark.usefixtures("no_leak")

POD = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork")
"""Starts a command with mounts, network and process numbers of its own, as a pod's processes."""


def ask(server: HandoverServer, **options: Any) -> Any:
    return attach(server.path, rank=0, device="host", **{"timeout": 10} | options)


def test_attaching_maps_the_same_memory(server: HandoverServer, source: Any) -> None:
    with ask(server) as attachment:
        (item,) = attachment.regions
        with mmap.mmap(item.descriptor, item.region.nbytes, prot=mmap.PROT_READ) as memory:
            assert memory[:] == source.content
        for descriptor in (item.descriptor, attachment.lease_descriptor):
            assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_the_connection_is_the_lease(server: HandoverServer, source: Any) -> None:
    with ask(server):
        source.until(lambda: [peer.pid for peer in source.peers] == [os.getpid()])
    source.until(lambda: not source.peers)


def test_a_killed_client_ends_its_lease(server: HandoverServer, source: Any) -> None:
    script = (
        "import sys, time; from headrace_handover import attach; "
        "held = attach(sys.argv[1], rank=0, device='host', timeout=10); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(server.path)]) as process:
        source.until(lambda: [peer.pid for peer in source.peers] == [process.pid])
        process.send_signal(signal.SIGKILL)
    source.until(lambda: not source.peers)


def test_progress_is_reported_until_the_weights_are_ready(
    server: HandoverServer, source: Any
) -> None:
    source.set(Loading(1, 4096, "waiting for the lease"))
    seen: list[Loading] = []

    def progress(loading: Loading) -> None:
        seen.append(loading)
        if len(seen) == 2:
            source.set(Loading(2048, 4096))
        if len(seen) > 2:
            source.set(source.offer)

    with ask(server, on_progress=progress):
        assert seen[0] == Loading(1, 4096, "waiting for the lease")
        assert Loading(2048, 4096) in seen


def test_progress_is_sent_now_and_then_and_the_weights_at_once(tmp_path: Path, source: Any) -> None:
    """However often the answer changes: 80 times a second with 8 ranks."""
    source.set(Loading(0, 4096))
    server = HandoverServer(tmp_path, source, Limits(progress_seconds=30))
    server.start()
    seen: list[Loading] = []

    def progress(loading: Loading) -> None:
        seen.append(loading)
        for step in range(20):
            time.sleep(0.01)
            source.set(Loading(step, 4096))
        source.set(source.offer)

    with attach(server.path, rank=0, device="host", timeout=10, on_progress=progress):
        assert seen == [Loading(0, 4096)]
    server.close()


def test_a_refusal_carries_its_reason(server: HandoverServer, source: Any) -> None:
    source.set(Failure("DigestMismatch", "file x, tensor y"))
    with pytest.raises(Refused, match="DigestMismatch: file x, tensor y") as caught:
        ask(server)
    assert caught.value.reason == "DigestMismatch"


def test_waiting_ends_at_the_timeout(server: HandoverServer, source: Any) -> None:
    source.set(Loading(1, 2))
    begin = time.monotonic()
    with pytest.raises(AttachTimeout, match=r"rank 0 was not handed over within 0.4 s"):
        ask(server, timeout=0.4)
    assert time.monotonic() - begin < 3


def test_a_loader_that_comes_later_is_waited_for(tmp_path: Path, source: Any) -> None:
    started: list[HandoverServer] = []

    def start() -> None:
        server = HandoverServer(tmp_path / "handover", source)
        server.start()
        started.append(server)

    timer = threading.Timer(0.3, start)
    timer.start()
    with attach(tmp_path / "handover/handover.sock", rank=0, device="host", timeout=10):
        pass
    timer.join()
    started[0].close()


def test_a_loader_that_restarts_while_loading_is_waited_for(tmp_path: Path, source: Any) -> None:
    source.set(Loading(1, 2))
    first = HandoverServer(tmp_path, source, Limits(progress_seconds=0.05))
    first.start()
    second: list[HandoverServer] = []

    def restart(_: Loading) -> None:
        if not second:
            first.close()
            source.set(source.offer)
            second.append(HandoverServer(tmp_path, source))
            second[0].start()

    with attach(first.path, rank=0, device="host", timeout=10, on_progress=restart) as attachment:
        assert len(attachment.regions) == 1
    second[0].close()


def test_no_loader_ends_in_a_message(tmp_path: Path) -> None:
    missing = tmp_path / "handover.sock"
    with pytest.raises(AttachTimeout, match="No such file"):
        attach(missing, rank=0, device="host", timeout=0.2)


def test_a_path_that_can_never_work_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(LoaderUnreachable, match="too long"):
        attach(tmp_path / ("x" * 120), rank=0, device="host", timeout=10)


def test_as_many_regions_as_the_kernel_can_pass(server: HandoverServer, source: Any) -> None:
    regions = tuple(Region(part, 4096, 4096, ()) for part in range(MAX_REGIONS))
    descriptors = (source.memory,) * MAX_REGIONS + (source.lease,)
    source.set(Offer(Ready(0, "c", regions), descriptors))
    with ask(server) as attachment:
        assert len(attachment.regions) == MAX_REGIONS
        assert attachment.nbytes == MAX_REGIONS * 4096


def test_a_large_reply_arrives_whole(server: HandoverServer, source: Any) -> None:
    names = grouped(Tensor(f"{index:0100}", "U8", (0,), 0, 0) for index in range(20000))
    source.set(Offer(Ready(0, "c", (Region(0, 4096, 4096, names),)), source.offer.descriptors))
    with ask(server) as attachment:
        assert sum(1 for _ in attachment.ready.regions[0].tensors) == 20000


def test_a_client_at_its_limit_of_open_files_says_so(server: HandoverServer, source: Any) -> None:
    script = (
        "import os, resource, sys; from headrace_handover import attach\n"
        "free = os.dup(0); os.close(free)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, free + 2))\n"
        "try: attach(sys.argv[1], rank=0, device='host', timeout=10)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(sorted(map(int, os.listdir('/proc/self/fd'))) [-1] <= free)\n"
    )
    command = [sys.executable, "-c", script, str(server.path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert re.match(r"ProtocolViolation file descriptors were lost.*ulimit -n.*\nTrue\n", out)


def serve_once(path: Path, reply: bytes, descriptors: list[int]) -> threading.Thread:
    """A server that answers one client with exactly `reply` and `descriptors`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def run() -> None:
        with listener, listener.accept()[0] as sock:
            sock.recv(4096)
            socket.send_fds(sock, [reply], descriptors)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_descriptors_is_refused(tmp_path: Path, source: Any, count: int) -> None:
    path = tmp_path / "fake.sock"
    thread = serve_once(path, source.offer.ready.encode(), [source.memory] * count)
    with pytest.raises(ProtocolViolation, match=f"{count} file descriptors"):
        attach(path, rank=0, device="host", timeout=10)
    thread.join()


def test_another_rank_than_asked_for_is_refused(tmp_path: Path, source: Any) -> None:
    path = tmp_path / "fake.sock"
    thread = serve_once(path, source.offer.ready.encode(), [source.memory, source.lease])
    with pytest.raises(ProtocolViolation, match="rank: 0: asked for 1"):
        attach(path, rank=1, device="host", timeout=10)
    thread.join()


def test_descriptors_with_a_wrong_message_do_not_leak(tmp_path: Path, source: Any) -> None:
    path = tmp_path / "fake.sock"
    thread = serve_once(path, b"nonsense\n", [source.memory] * 5)
    with pytest.raises(ProtocolViolation, match="JSON"):
        attach(path, rank=0, device="host", timeout=10)
    thread.join()


def test_a_second_server_does_not_take_the_socket(server: HandoverServer, source: Any) -> None:
    with pytest.raises(HandoverError, match="another loader"):
        HandoverServer(server.path.parent, source)
    with ask(server):
        pass


def test_the_directory_is_closed_to_others(server: HandoverServer) -> None:
    assert server.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_is_a_link_is_refused(tmp_path: Path, source: Any) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(HandoverError, match="not a link"):
        HandoverServer(tmp_path / "link", source)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_user_is_refused(server: HandoverServer, source: Any, tmp_path: Path) -> None:
    # Directory modes keep strangers out already; opening them shows the uid check alone.
    for directory in (server.path.parent, *server.path.parent.parents[:-1]):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/tmp"):
            directory.chmod(0o755)
    server.path.chmod(0o666)
    script = (
        "import os, sys; from headrace_handover import attach\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: attach(sys.argv[1], rank=0, device='host', timeout=10)\n"
        "except Exception as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(server.path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert out.startswith("PeerNotPermitted: user 65534 may not attach")
    assert source.refusals == ["PeerNotPermitted"]


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*POD, "true"], check=False).returncode != 0,
    reason="a process with mounts of its own needs unshare and leave to use it",
)
@pytest.mark.parametrize(
    ("volume", "answer"),
    [("true", "attached"), ('mount -t tmpfs emptyDir "$(dirname "$0")"', "AttachTimeout")],
    ids=["same volume", "volume of its own"],
)
def test_a_process_of_another_pod_finds_no_loader(
    server: HandoverServer, source: Any, volume: str, answer: str
) -> None:
    # As in Kubernetes, where each pod has an emptyDir at this path: same user, same node, same
    # path, network and processes of its own.
    script = (
        "import sys; from headrace_handover import attach\n"
        "try: attach(sys.argv[1], rank=0, device='host', timeout=2).close(); print('attached')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    shell = f'{volume} && exec "$1" -c "$2" "$0"'
    command = [*POD, "sh", "-ec", shell, str(server.path), sys.executable, script]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert out.startswith(answer)
    assert source.refusals == []
