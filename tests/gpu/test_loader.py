"""The CUDA backend on a real GPU, by real loader processes."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from headrace_handover import attach

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024
SMALL = (
    (("a", "F32", (5000,)), ("b", "BF16", (3000,))),
    (("c", "U8", (70001,)), ("scale", "F32", ())),
)
LARGE = ((("big", "U8", (70 * MIB,)), ("odd", "U8", (4 * MIB + 3,))),)


@pytest.fixture(scope="module")
def mapping(gpu: None) -> ModuleType:
    """The module bench/gpu.py, which maps exported memory without torch."""
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def device(mapping: ModuleType) -> Any:
    return mapping.Device()


@pytest.fixture
def start(start_loader: Callable[..., Any], device: Any) -> Callable[..., Any]:
    def with_cuda(checkpoint: Path, *arguments: str) -> Any:
        return start_loader(checkpoint, "--backend", "cuda", *arguments)

    return with_cuda


@pytest.mark.parametrize(("parts", "chunk_bytes"), [(SMALL, 4096), (LARGE, 4 * MIB), (LARGE, 4096)])
def test_what_an_engine_maps_equals_the_files(
    support: Any,
    start: Any,
    device: Any,
    mapping: Any,
    tmp_path: Path,
    parts: Any,
    chunk_bytes: int,
) -> None:
    manifest = support.make_checkpoint(
        tmp_path / "c", parts=parts, chunk_bytes=chunk_bytes, algorithm="multilinear64"
    )
    loader = start(tmp_path / "c")
    status = loader.until_phase("Ready")
    assert status["ranks"][0]["verifiedBytes"] == manifest.total_bytes
    assert status["directPath"]["active"] is False
    assert status["ranks"][0]["gpu"]["pciBusId"] == device.pci_bus_id
    with attach(loader.socket, rank=0, device=device.uuid, timeout=60) as weights:
        for item, part in zip(weights.regions, manifest.rank_parts(0), strict=True):
            mapped = mapping.map_read_only(device, item.descriptor, item.region.nbytes)
            found = mapping.content(mapped.pointer, part.data_bytes)
            mapped.release()
            assert found == support.part_data(tmp_path / "c", part)


def test_cold_files_are_read_directly(
    support: Any, start: Any, device: Any, mapping: Any, tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(
        tmp_path / "c", parts=LARGE, chunk_bytes=MIB, algorithm="multilinear64"
    )
    part = manifest.rank_parts(0)[0]
    with (tmp_path / "c" / part.file).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    loader = start(tmp_path / "c")
    rank = loader.until_phase("Ready")["ranks"][0]
    if rank["path"] != "O_DIRECT":
        pytest.skip(f"this file system has no direct reads: {rank['pathReason']}")
    with attach(loader.socket, rank=0, device=device.uuid, timeout=60) as weights:
        item = weights.regions[0]
        mapped = mapping.map_read_only(device, item.descriptor, item.region.nbytes)
        found = mapping.content(mapped.pointer, part.data_bytes)
        mapped.release()
    assert found == support.part_data(tmp_path / "c", part)


@pytest.mark.parametrize("position", [0, 70 * MIB + 5, 74 * MIB + 2])
def test_a_flipped_bit_stops_the_load_with_file_chunk_and_tensor(
    support: Any, start: Any, tmp_path: Path, position: int
) -> None:
    manifest = support.make_checkpoint(
        tmp_path / "c", parts=LARGE, chunk_bytes=MIB, algorithm="multilinear64"
    )
    part = manifest.rank_parts(0)[0]
    with (tmp_path / "c" / part.file).open("r+b") as file:
        file.seek(part.data_offset + position)
        octet = file.read(1)[0]
        file.seek(part.data_offset + position)
        file.write(bytes([octet ^ 0x10]))
    loader = start(tmp_path / "c")
    assert loader.wait() == 65
    termination = loader.termination()
    assert termination["reason"] == "DigestMismatch"
    for word in (part.file, f"chunk {position // MIB} ", "odd" if position > 70 * MIB else "big"):
        assert word in termination["message"]


def test_other_digests_are_refused(support: Any, start: Any, tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "c", algorithm="sha256")
    loader = start(tmp_path / "c")
    assert loader.wait() == 69
    assert "digestAlgorithm sha256" in loader.termination()["message"]


def test_require_is_refused_without_nvidia_fs(support: Any, start: Any, tmp_path: Path) -> None:
    if Path("/proc/driver/nvidia-fs/version").exists():
        pytest.skip("nvidia-fs is loaded here")
    support.make_checkpoint(tmp_path / "c", algorithm="multilinear64")
    loader = start(tmp_path / "c", "--path", "Require")
    assert loader.wait() == 69
    assert loader.termination()["reason"] == "DirectPathUnavailable"
    assert "nvidia-fs" in loader.termination()["message"]


def test_weights_that_do_not_fit_are_refused_with_what_is_free(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace_loader.backends import BackendOptions, PathPolicy, open_backend
    from headrace_loader.errors import OutOfMemory

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    backend = open_backend("cuda", BackendOptions(0, PathPolicy.OFF, 1, 1))
    with pytest.raises(OutOfMemory, match=rf"{device.uuid}.*{1 << 42} bytes.*bytes are free"):
        backend.allocate(1 << 42)


def test_gpu_memory_is_free_again_when_the_loader_ends(
    support: Any, start: Any, device: Any, tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "c", parts=LARGE, chunk_bytes=MIB, algorithm="multilinear64")
    before = device.free_bytes()
    loader = start(tmp_path / "c")
    loader.until_phase("Ready")
    assert before - device.free_bytes() >= 74 * MIB
    loader.terminate()
    assert device.free_bytes() >= before
