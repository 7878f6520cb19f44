"""The process itself: signals before it has handlers, open files, workers that talk nonsense."""

import contextlib
import errno
import fcntl
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_handover.messages import Request
from headrace_loader import worker_process
from headrace_loader.backends import PathPolicy
from headrace_loader.engine_cache import EngineCache, EngineCacheOptions
from headrace_loader.errors import GpuFailed, RuntimeDirectoryUnusable, StorageError
from headrace_loader.lease import Lease
from headrace_loader.loading import Load, stalled
from headrace_loader.state import LoaderState, Phase, RankState, Settings
from headrace_loader.system import usable_cpus
from headrace_loader.weight_source import ResidentWeights
from headrace_loader.worker_process import WorkerEnded, WorkerEvent, WorkerOptions, WorkerProcess
from headrace_loader.worker_protocol import Failed


def blocked(pid: int) -> bool:
    """Whether a process keeps SIGTERM pending by itself: unshare does so before it runs it."""
    with contextlib.suppress(OSError):
        if not Path(f"/proc/{pid}/cmdline").read_text().startswith(sys.executable):
            return False
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigBlk:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_share_the_cpus(
    support: Any, tmp_path: Path, start_loader: Callable[..., Any]
) -> None:
    support.make_checkpoint(tmp_path / "three", ranks=3)
    held = support.hold(tmp_path / "three" / "model-rank-0-part-0.safetensors")
    loader = start_loader(tmp_path / "three", "--tensor-parallel-size=3")
    loader.until_phase("Loading")
    children = Path(f"/proc/{loader.process.pid}/task/{loader.process.pid}/children")
    deadline, command = time.monotonic() + 30, [""]
    while "headrace_loader.worker_main" not in command:
        assert time.monotonic() < deadline
        for worker in children.read_text().split():
            command = Path(f"/proc/{worker}/cmdline").read_text().split("\0")
    os.close(held)
    assert f"--cpus={max(1, usable_cpus() // 3)}" in command


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a PID namespace needs root"
)
@pytest.mark.parametrize("command", ["loader", "sharder"])
def test_process_1_obeys_a_signal_that_comes_before_its_handlers(
    support: Any, tmp_path: Path, command: str
) -> None:
    """The kernel drops what process 1 has no handler for, unless it is blocked."""
    support.make_checkpoint(tmp_path / "checkpoint")
    arguments = {
        "loader": ["headrace_loader", f"--checkpoint={tmp_path}/checkpoint", "--backend=host"],
        "sharder": ["headrace_loader.command", "shard", "--source=/nowhere"],
    }[command]
    arguments += {
        "loader": [f"--runtime-dir={tmp_path}/run", "--host=127.0.0.1", f"--port={free_port()}"],
        "sharder": [f"--output={tmp_path}/out"],
    }[command]
    parent = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        deadline = time.monotonic() + 30
        while not (found := children.read_text().split()) or not blocked(int(found[0])):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(int(found[0]), signal.SIGTERM)
        output, _ = parent.communicate(timeout=30)
    finally:
        parent.kill()
        parent.communicate()
    assert "SIGTERM" in output
    assert "Traceback" not in output


def test_nothing_is_imported_before_signals_are_kept() -> None:
    script = (
        "import sys, headrace_loader.__main__, headrace_loader.command\n"
        "print([name for name in ('numpy', 'headrace_loader.supervisor') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert out.stdout == b"[]\n"


def test_weights_stay_when_the_log_has_no_reader(support: Any, tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    command = [sys.executable, "-m", "headrace_loader", f"--checkpoint={tmp_path}/checkpoint"]
    command += [f"--runtime-dir={tmp_path}/run", "--backend=host", f"--port={free_port()}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as loader:
        assert loader.stdout is not None
        assert loader.stderr is not None
        while b'"resident"' not in loader.stdout.readline():
            pass
        loader.stdout.close()
        loader.send_signal(signal.SIGTERM)  # which is logged
        said = loader.stderr.read()
    assert (loader.returncode, said) == (0, b"")


def test_a_loader_ends_at_once_while_caches_are_restored(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "store").mkdir()
    (tmp_path / "cache").mkdir()
    options = EngineCacheOptions(
        local=tmp_path / "cache", store=tmp_path / "store", key="k", engine_port=1
    )
    file = EngineCache(options, LoaderState(Settings("host", PathPolicy.OFF, 1), 0.0))._file
    os.mkfifo(file)  # opening it blocks
    loader = start_loader(
        tmp_path / "checkpoint",
        f"--engine-cache-store={options.store}",
        f"--engine-cache-dir={options.local}",
        "--engine-cache-key=k",
    )
    loader.until(lambda status: "resident" in status["timeline"])
    begin = time.monotonic()
    assert loader.terminate() == 0
    assert time.monotonic() - begin < 10
    assert '"resident"' not in loader.log.read_text()  # it never was Ready


def test_with_a_mocked_worker_that_cannot_be_killed_a_loader_ends(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """As one is that waits for a GPU which fell off the bus; its plan is larger than a pipe."""
    support.make_checkpoint(
        tmp_path / "checkpoint", parts=((("a", "U8", (8 << 20,)),),), chunk_bytes=4096
    )
    shim = support.shim(
        tmp_path,
        "import os, sys, time\n"
        "if 'headrace_loader.worker_main' in sys.orig_argv:\n"
        "    os.fork()\n"  # of the two one is killed, the other keeps socket and pipe
        "    time.sleep(30)\n"
        "    os._exit(0)\n"
        "from headrace_loader import supervisor\n"
        "supervisor._END_SECONDS = 4.0\n",
    )
    loader = start_loader(tmp_path / "checkpoint", **shim)
    loader.until_phase("Loading")
    begin = time.monotonic()
    assert loader.terminate() == 0
    assert time.monotonic() - begin < 7.5  # waited for once


def test_a_worker_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    for name in ("select", "headrace_loader"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w')\n")
    options = WorkerOptions("host", PathPolicy.OFF, 1, 1)
    command = worker_process._command(0, options, 0)
    subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert not (tmp_path / "imported").exists()


def test_workers_that_stay_when_all_is_verified_are_named() -> None:
    state = RankState(3, 10)
    error = stalled([state], Load([], set(), {3}, 0.0), 300)
    assert isinstance(error, GpuFailed)
    assert "rank 3: the weights are verified, but their worker did not end" in str(error)
    error = stalled([state], Load([], {3}, {3}, 0.0), 300)
    assert isinstance(error, StorageError)


def test_a_lease_where_files_cannot_be_locked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RuntimeDirectoryUnusable, match="No locks available: --runtime-dir must"):
        Lease(tmp_path).acquire()


@pytest.mark.parametrize("phase", [Phase.READY, Phase.FAILED])
def test_what_is_known_already_is_not_waited_for(phase: Phase) -> None:
    """A change between an answer and the wait for the next would be missed."""
    state = LoaderState(Settings("host", PathPolicy.OFF, 1), 0.0, phase, ranks=[RankState(0, 1)])
    begin = time.monotonic()
    ResidentWeights(state).wait(Request(0, "host"), 60)
    assert time.monotonic() - begin < 30


def test_as_many_files_may_be_open_as_the_node_allows() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200))\n"
        "from headrace_loader import system; system.allow_open_files()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert out.stdout == b"(200, 200)\n"


def test_a_worker_that_talks_nonsense_is_told_of_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(_device: int, _options: WorkerOptions, descriptor: int) -> list[str]:
        script = f"import os, time; os.write({descriptor}, b'nonsense\\n'); time.sleep(60)"
        return [sys.executable, "-c", script]

    monkeypatch.setattr(worker_process, "_command", command)
    news: queue.SimpleQueue[Any] = queue.SimpleQueue()
    worker = WorkerProcess(3, 0, WorkerOptions("host", PathPolicy.OFF, 1, 1), news.put)
    event, end = news.get(timeout=30), news.get(timeout=30)
    worker.stop(10)
    assert isinstance(event, WorkerEvent)
    assert isinstance(event.message, Failed)
    assert "rank 3: what the worker sent cannot be used" in event.message.message
    assert "nonsense" in event.message.message
    assert end == WorkerEnded(3, -signal.SIGKILL)
