"""Compiled code survives the pod: packed when the engine answers, unpacked before the next one."""

import contextlib
import http.server
import os
import socket
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace_loader import engine_cache
from headrace_loader.backends import PathPolicy
from headrace_loader.engine_cache import CONTENT, EngineCache, EngineCacheOptions, processors
from headrace_loader.state import EngineCachePhase, LoaderState, Settings


class Pod:
    """One pod's view: its own directory, the volume shared with other pods."""

    def __init__(self, root: Path, name: str, *, port: int = 1) -> None:
        self.local = root / name
        self.local.mkdir()
        self.store = root / "store"
        self.store.mkdir(exist_ok=True)
        self.content = self.local / CONTENT
        self.options = EngineCacheOptions(
            local=self.local, store=self.store, key="k", engine_port=port
        )
        self.restart()

    def restart(self) -> None:
        """Begin as a loader does."""
        self.state = LoaderState(Settings("host", PathPolicy.OFF, 1), 0.0)
        self.cache = EngineCache(self.options, self.state)

    @property
    def phase(self) -> EngineCachePhase:
        return self.state.engine_cache.phase

    def compiles(self, **files: str) -> None:
        for name, text in files.items():
            path = self.content / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def stored(self) -> list[str]:
        return sorted(path.name for path in self.store.iterdir())


def after_one_that_published(root: Path, **more: str) -> Pod:
    """Return a new pod; one before it has compiled a graph, and what else is given."""
    first, second = Pod(root, "first"), Pod(root, "second")
    first.compiles(graph="compiled", **more)
    first.cache.publish()
    return second


@contextmanager
def no_http() -> Iterator[int]:
    """A server that answers whatever it is asked with something else."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.recv(1000)
                        connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextmanager
def engine() -> Iterator[int]:
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_the_next_pod_finds_what_the_first_one_compiled(tmp_path: Path) -> None:
    first, second = Pod(tmp_path, "first"), Pod(tmp_path, "second")
    first.cache.restore()
    assert first.phase is EngineCachePhase.MISSING
    first.compiles(**{"vllm/torch/graph": "compiled", "triton/kernel": "code"})
    first.cache.publish()
    assert first.phase is EngineCachePhase.PUBLISHED
    second.cache.restore()
    assert second.phase is EngineCachePhase.RESTORED
    assert (second.content / "vllm/torch/graph").read_text() == "compiled"
    assert second.state.engine_cache.nbytes == len("compiled") + len("code")


def test_nothing_new_is_not_written_again(tmp_path: Path) -> None:
    second = after_one_that_published(tmp_path)
    second.cache.restore()
    (stored,) = second.store.iterdir()
    before = stored.stat()
    second.cache.publish()
    assert stored.stat().st_ino == before.st_ino
    second.compiles(more="of another configuration")
    second.cache.publish()
    assert stored.stat().st_ino != before.st_ino
    assert second.stored() == [stored.name]


def test_what_another_pod_added_is_not_replaced_by_less(tmp_path: Path) -> None:
    first, second, third = (Pod(tmp_path, name) for name in ("first", "second", "third"))
    first.compiles(graph="compiled")
    first.cache.publish()
    second.cache.restore()
    third.cache.restore()
    second.compiles(more="of another configuration")
    second.cache.publish()
    (stored,) = second.store.iterdir()
    before = stored.stat()
    third.cache.publish()
    assert stored.stat().st_ino == before.st_ino


def test_a_restarted_container_does_not_write_the_same_again(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "pod")
    pod.compiles(graph="compiled")
    pod.cache.publish()
    (stored,) = pod.store.iterdir()
    before = stored.stat()
    pod.restart()
    pod.cache.restore()
    assert pod.phase is EngineCachePhase.KEPT
    pod.cache.publish()
    assert stored.stat().st_ino == before.st_ino


def test_the_engine_that_answers_triggers_publication(tmp_path: Path) -> None:
    with engine() as port:
        pod = Pod(tmp_path, "pod", port=port)
        pod.compiles(graph="compiled")
        pod.cache.watch()
        pod.state.wait_for(lambda: "engineCachePublished" in pod.state.timeline, 10)
    assert pod.phase is EngineCachePhase.PUBLISHED
    assert {"engineReady", "engineCachePublished"} <= set(pod.state.timeline)


def test_what_is_no_engine_does_not_answer() -> None:
    with no_http() as port:
        assert not engine_cache._answers(f"http://127.0.0.1:{port}/health")


def test_many_pods_write_and_every_reader_sees_a_whole_file(tmp_path: Path) -> None:
    pods = [Pod(tmp_path, f"pod-{number}") for number in range(8)]
    for number, pod in enumerate(pods):
        pod.compiles(**{f"kernel-{n}": str(number) * 4096 for n in range(8)})
    writers = [threading.Thread(target=pod.cache.publish) for pod in pods]
    for writer in writers:
        writer.start()
    for number in range(20):
        reader = Pod(tmp_path, f"reader-{number}")
        reader.cache.restore()
        assert reader.phase in (EngineCachePhase.MISSING, EngineCachePhase.RESTORED)
    for writer in writers:
        writer.join()
    last = Pod(tmp_path, "last")
    last.cache.restore()
    assert len({path.read_text() for path in last.content.iterdir()}) == 1


def test_what_a_killed_pod_left_is_removed_and_no_younger_file(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "pod")
    pod.compiles(graph="compiled")
    pod.cache.publish()
    (name,) = pod.stored()
    old, young = (pod.store / f".{Path(name).stem}.{end}" for end in ("old", "young"))
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    pod.compiles(more="compiled")
    pod.cache.publish()
    assert pod.stored() == sorted([name, young.name])


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "method"])
def test_a_damaged_file_is_said_and_ignored(tmp_path: Path, damage: str) -> None:
    first, second = Pod(tmp_path, "first"), Pod(tmp_path, "second")
    first.compiles(graph="compiled" * 100)
    first.cache.publish()
    (stored,) = first.store.iterdir()
    data = bytearray(stored.read_bytes())
    if damage == "flipped":
        data[data.index(b"compiled")] ^= 1
    if damage == "method":
        data[data.index(b"PK\1\2") + 10] = 99  # a compression that zipfile does not have
    stored.write_bytes(bytes(data[: {"torn": 300, "empty": 0}.get(damage)]))
    second.cache.restore()
    assert second.phase is EngineCachePhase.FAILED
    assert str(stored) in second.state.engine_cache.message
    assert not second.content.exists()
    assert list(second.local.iterdir()) == []
    second.compiles(graph="compiled" * 100)
    second.cache.publish()
    third = Pod(tmp_path, "third")
    third.cache.restore()
    assert third.phase is EngineCachePhase.RESTORED


def test_an_archive_cannot_write_outside(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "pod")
    other = Pod(tmp_path, "other")
    other.compiles(graph="compiled")
    other.cache.publish()
    (stored,) = pod.store.iterdir()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("../../outside", "x")
        archive.writestr("/absolute", "x")
    pod.cache.restore()
    inside = {str(path.relative_to(pod.content)) for path in pod.content.rglob("*")}
    assert inside == {"outside", "absolute"}


def test_links_are_not_packed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not a cache")
    pod, other = Pod(tmp_path, "pod"), Pod(tmp_path, "other")
    pod.compiles(graph="compiled")
    (pod.content / "link").symlink_to(secret)
    (pod.content / "directory").symlink_to(tmp_path)
    pod.cache.publish()
    other.cache.restore()
    assert [path.name for path in other.content.rglob("*")] == ["graph"]


def test_too_much_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "MAX_BYTES", 10)
    pod = Pod(tmp_path, "pod")
    pod.compiles(graph="more than ten bytes")
    with pytest.raises(ValueError, match="19 bytes are more than"):
        pod.cache.publish()
    assert pod.stored() == []


def test_what_an_engine_has_begun_is_kept(tmp_path: Path) -> None:
    second = after_one_that_published(tmp_path)
    second.compiles(graph="its own")
    second.cache.restore()
    assert second.phase is EngineCachePhase.KEPT
    assert (second.content / "graph").read_text() == "its own"


def test_what_a_killed_loader_unpacked_is_removed(tmp_path: Path) -> None:
    second = after_one_that_published(tmp_path)
    (second.local / ".new-1" / CONTENT).mkdir(parents=True)
    second.cache.restore()
    assert sorted(path.name for path in second.local.iterdir()) == [CONTENT]


def test_a_loader_that_ends_stops_unpacking(tmp_path: Path) -> None:
    second = after_one_that_published(tmp_path)
    second.cache.stop()
    second.cache.restore()
    assert second.phase is EngineCachePhase.OFF
    assert list(second.local.iterdir()) == []


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    second = after_one_that_published(tmp_path)
    second.local.rmdir()
    second.cache.restore()
    assert second.phase is EngineCachePhase.FAILED
    assert f"No such file or directory: '{second.local}" in second.state.engine_cache.message


def test_an_engine_that_did_not_wait_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = after_one_that_published(tmp_path, more="of another configuration")
    (stored,) = second.store.iterdir()
    before = stored.stat()
    extract = zipfile.ZipFile.extract

    def slowly(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> str:
        second.compiles(graph="compiled")
        return extract(archive, entry, path)

    monkeypatch.setattr(zipfile.ZipFile, "extract", slowly)
    second.cache.restore()
    assert second.phase is EngineCachePhase.FAILED
    assert "an engine that did not wait has begun" in second.state.engine_cache.message
    second.cache.publish()
    assert stored.stat().st_ino == before.st_ino  # what it has is less


def test_one_file_may_be_larger_than_two_gib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 4)
    second = after_one_that_published(tmp_path)
    second.cache.restore()
    assert (second.content / "graph").read_text() == "compiled"


def test_arm_cores_are_told_apart_by_recorded_proc(tmp_path: Path) -> None:
    for name, variant in (("", "0x0"), ("model name\t: ARMv8 Processor rev 0 (v8l)\n", "0x1")):
        (tmp_path / "cpuinfo").write_text(
            f"{name}CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: {variant}\n"
            "CPU part\t: 0xd4f\n"
        )
        assert processors(tmp_path) == f"no GPU 0x41 {variant} 0xd4f"


def test_processors_name_gpu_and_cpu_by_recorded_proc(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Xeon 8488C\n")
    assert processors(tmp_path) == "no GPU Xeon 8488C"
    information = tmp_path / "driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    assert processors(tmp_path) == "NVIDIA H200 Xeon 8488C"
