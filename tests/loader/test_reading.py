"""Reads that are cut short and memory that cannot be had, in the host backend."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from headrace_loader import system
from headrace_loader.backends import BackendOptions, PartSource, PathPolicy, host, reading
from headrace_loader.backends.host import HostBackend
from headrace_loader.backends.reading import PartFile
from headrace_loader.errors import DigestMismatch, OutOfMemory

CONTENT = os.urandom(5 * 4096 + 100)


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartFile:
    """A part that is read past the page cache."""
    path = tmp_path / "part"
    path.write_bytes(bytes(4096) + CONTENT)
    monkeypatch.setattr(reading, "is_cached", lambda *_: False)
    file = PartFile(PartSource(path, 4096, len(CONTENT), 1 << 20, "sha256", ("0",)))
    if file.buffered_reason:
        pytest.skip(f"needs direct I/O: {file.buffered_reason}")
    return file


@pytest.fixture
def buffer() -> memoryview:
    return host._Buffers(1 << 20).view


@pytest.mark.parametrize("limit", [4096, 5000])
def test_a_direct_read_cut_short_goes_on(
    part: PartFile, buffer: memoryview, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """As file systems of several servers may answer; `limit` bytes come of each that asks more."""
    preadv = os.preadv

    def short(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert offset % 4096 == 0
        return min(preadv(descriptor, buffers, offset), limit)

    monkeypatch.setattr(os, "preadv", short)
    with part:
        part.read_into(buffer, 0, len(CONTENT))
    assert buffer[: len(CONTENT)] == CONTENT


def test_a_part_that_is_cut_while_it_is_read(part: PartFile, buffer: memoryview) -> None:
    os.truncate(part.source.path, 4096 + 4096 + 1000)
    with part, pytest.raises(DigestMismatch, match="it was cut while it was read"):
        part.read_into(buffer, 0, len(CONTENT))


def test_a_load_that_is_cached_in_part_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for number in range(3):
        path = tmp_path / f"part{number}"
        path.write_bytes(bytes(8192))
        monkeypatch.setattr(reading, "is_cached", lambda *_, first=number == 0: first)
        files.append(PartFile(PartSource(path, 4096, 4096, 4096, "sha256", ("0",))))
    direct = files[1].path
    report = reading.staged(files, "X", "")
    assert report.path == "mixed"
    assert report.reason.startswith(f"1 of 3 files by PageCache, 2 of 3 files by {direct}")
    alone = reading.staged(files[:1], "X", "")
    assert (alone.path, alone.reason) == ("PageCache", "")
    for file in files:
        file.close()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_threads_keep_to_the_containers_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int | None
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(system, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert system.usable_cpus() == (cpus or 16)


@pytest.mark.parametrize(("chunk_bytes", "threads"), [(4 << 20, 10), (1 << 29, 2), (1 << 30, 1)])
def test_large_chunks_are_read_by_fewer_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, threads: int
) -> None:
    path = tmp_path / "part"
    path.write_bytes(bytes(8192))
    asked: list[int] = []

    def record(_work: object, bodies: Sequence[Callable[..., None]]) -> None:
        asked.append(len(bodies))

    monkeypatch.setattr(host, "run_parallel", record)
    monkeypatch.setattr(reading, "is_cached", lambda *_: False)
    backend = HostBackend(BackendOptions(0, PathPolicy.OFF, 10, 10))
    source = PartSource(path, 4096, 4096, chunk_bytes, "sha256", ("0",))

    class Silent:
        def path(self, _report: object) -> None: ...
        def read(self, _nbytes: int) -> None: ...
        def verified(self, _nbytes: int) -> None: ...

    backend.fill([(backend.allocate(4096), source)], Silent())
    assert asked == [threads]


@pytest.mark.parametrize(
    ("cached", "cpus", "share", "expected"),
    [
        ((True, True), 2, 9, 2),
        ((True, True), 9, 9, 8),
        ((True, True), 9, 2, 2),
        ((True, True), 64, 64, 40),
        ((True, False), 2, 2, 40),
    ],
)
def test_files_in_the_page_cache_are_read_by_threads_that_each_have_a_cpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: tuple[bool, ...],
    cpus: int,
    share: int,
    expected: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    files = []
    for number, one in enumerate(cached):
        path = tmp_path / str(number)
        path.write_bytes(bytes(4096))
        monkeypatch.setattr(reading, "is_cached", lambda *_, one=one: one)
        files.append(PartFile(PartSource(path, 0, 4096, 1 << 20, "sha256", ("0",))))
    assert reading.threads_for(files, 40, share) == expected
    assert reading.threads_for(files, 1, share) == 1
    for file in files:
        file.close()


def test_more_memory_than_there_are_addresses() -> None:
    with pytest.raises(OutOfMemory, match="9223372036854775807 bytes of host memory"):
        HostBackend(BackendOptions(0, PathPolicy.OFF, 1, 1)).allocate(2**63 - 1)
