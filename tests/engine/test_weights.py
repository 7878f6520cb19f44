"""Resident weights as torch tensors: shared, read-only, and still there when the loader is not."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace_engine import attach
from headrace_engine.errors import Unsupported, WeightsMismatch
from headrace_engine.mapping import HostMapping
from headrace_engine.weights import ALIGNMENT, Weights
from headrace_handover import MappableRegion, Ready, Region, Request, Tensor
from headrace_handover.messages import grouped
from headrace_handover.server import HandoverServer, Offer

ENGINES = Path(__file__).parents[2] / "docs/engines.md"
SPECS = (
    ("matrix", "BF16", (128, 64)),
    ("vector", "F32", (64,)),
    ("bytes", "U8", (259,)),
    ("empty", "F16", (0, 4)),
    ("scale", "F32", ()),
)


@pytest.fixture(scope="module")
def checkpoint(support: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "made"
    support.make_checkpoint(directory, parts=(SPECS,))
    return directory


@pytest.fixture(scope="module")
def loader(start_loader: Callable[..., Any], checkpoint: Path) -> Any:
    started = start_loader(checkpoint)
    started.until_phase("Ready")
    return started


@contextlib.contextmanager
def attached(loader: Any) -> Iterator[Weights]:
    weights = attach(loader.socket, device="cpu")
    try:
        yield weights
    finally:
        weights.attachment.close()


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def test_tensors_equal_the_file(loader: Any, checkpoint: Path) -> None:
    with attached(loader) as weights:
        region = weights.attachment.ready.regions[0]
        data = next(checkpoint.glob("*.safetensors")).read_bytes()[-region.data_bytes :]
        for entry in region.tensors:
            tensor = weights[entry.name]
            assert tensor.shape == entry.shape
            assert raw(tensor) == data[entry.offset : entry.offset + entry.nbytes]
        assert weights["matrix"].dtype == torch.bfloat16


def test_aligned_tensors_are_views_and_the_rest_is_named(loader: Any) -> None:
    with attached(loader) as weights:
        assert [copy.name for copy in weights.copies] == ["scale"]
        for name in ("matrix", "vector", "bytes"):
            tensor = weights[name]
            assert tensor.data_ptr() % ALIGNMENT == 0
            assert mapping_at(tensor.data_ptr()) == "r--s /memfd:headrace (deleted)"
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert mapping_at(weights["scale"].data_ptr()).startswith("rw-p")


def mapping_at(address: int) -> str:
    """Permissions and file of the mapping that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _offset, _device, _inode, *name = line.split()
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return " ".join([permissions, *name])
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.parametrize(
    ("action", "code"),
    [("tensor.sum()", 0), ("tensor.fill_(1)", -signal.SIGSEGV), ("tensor[0] += 1", -11)],
)
def test_a_write_faults(loader: Any, action: str, code: int) -> None:
    script = (
        "import sys; from headrace_engine import attach\n"
        "tensor = attach(sys.argv[1], device='cpu')['vector']\n"
        f"{action}\n"
    )
    command = [sys.executable, "-c", script, str(loader.socket)]
    assert subprocess.run(command, timeout=120, check=False).returncode == code


def test_tensors_outlive_the_loader_and_the_attachment(
    start_loader: Callable[..., Any], checkpoint: Path
) -> None:
    loader = start_loader(checkpoint)
    weights = attach(loader.socket, device="cpu")
    matrix = weights["matrix"]
    before = raw(matrix)
    loader.kill()
    weights.attachment.close()
    del weights
    assert raw(matrix) == before
    assert raw(matrix[3]) == before[3 * 128 : 4 * 128]


Inode = tuple[int, int]


def held(inodes: set[Inode]) -> set[Inode]:
    """Which of some files, by device and number, this process has open or mapped."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        device, number = line.split()[3:5]
        found.add((os.makedev(*(int(part, 16) for part in device.split(":"))), int(number)))
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.add((path.stat().st_dev, path.stat().st_ino))
    return inodes & found


def test_memory_and_lease_go_with_the_last_tensor(
    start_loader: Callable[..., Any], checkpoint: Path
) -> None:
    loader = start_loader(checkpoint)
    loader.until_phase("Ready")
    weights = attach(loader.socket, device="cpu")
    (region,) = weights.attachment.regions
    descriptors = (region.descriptor, weights.attachment.lease_descriptor)
    inodes = {(status.st_dev, status.st_ino) for status in map(os.fstat, descriptors)}
    matrix = weights["matrix"]
    del weights
    gc.collect()
    assert loader.status()["engines"][0]["detached"] is None
    assert held(inodes) == inodes
    del matrix
    gc.collect()
    assert held(inodes) == set()
    loader.until(lambda status: status["engines"][0]["detached"] is not None)


def test_an_older_torch_without_numpy_will_do(loader: Any) -> None:
    script = (
        "import sys, torch\n"
        "del torch.float8_e8m0fnu\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'numpy']:\n"
        "    sys.modules[name] = None\n"
        "sys.modules['numpy'] = None\n"
        "from headrace_engine import attach\n"
        "weights = attach(sys.argv[1], device='cpu', timeout=float('inf'))\n"
        "print(weights['matrix'].sum())\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(loader.socket)]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor(")


def test_the_socket_comes_from_the_environment(
    loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_SOCKET", str(loader.socket))
    weights = attach(device="cpu")
    weights.attachment.close()
    assert weights.checkpoint == loader.status()["checkpoint"]["manifestDigest"]
    assert weights.nbytes == loader.status()["totalBytes"]


def test_the_example_of_the_documentation_runs(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    match = re.search(r"```python\n(.*?)```", ENGINES.read_text(), re.DOTALL)
    assert match is not None
    specs = (("up.weight", "F32", (256, 64)), ("down.weight", "F32", (64, 256)))
    support.make_checkpoint(tmp_path / "checkpoint", parts=(specs,))
    loader = start_loader(tmp_path / "checkpoint")
    environment = {"HEADRACE_SOCKET": str(loader.socket), "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(
        [sys.executable, "-c", match[1]],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "2 tensors, 131072 bytes, mapped in" in out
    assert "tensor(" in out.splitlines()[-1]


def test_memory_that_is_too_short_is_refused() -> None:
    descriptor = os.memfd_create("short")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(WeightsMismatch, match="4096 bytes: the loader says 8192"):
        HostMapping(MappableRegion(Region(0, 8192, 8192, ()), descriptor))
    os.close(descriptor)


class Holder:
    """A source of weights that notes when a lease ends."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer
        self.ended = threading.Event()

    def answer(self, _request: Request) -> Offer:
        return self.offer

    def detached(self, _peer: object) -> None:
        self.ended.set()

    def attached(self, _peer: object) -> None: ...
    def wait(self, _request: Request, _seconds: float) -> None: ...
    def refused(self, _reason: str) -> None: ...


def test_an_attach_that_fails_in_the_middle_gives_everything_back(tmp_path: Path) -> None:
    """The second part contradicts itself when the first one is mapped."""
    memory = [os.memfd_create("headrace-half"), os.memfd_create("headrace-half")]
    for descriptor in memory:
        os.ftruncate(descriptor, 4096)
    sound, wrong = Tensor("a", "U8", (4096,), 0, 4096), Tensor("b", "F32", (2,), 0, 4)
    regions = tuple(Region(n, 4096, 4096, grouped([one])) for n, one in enumerate((sound, wrong)))
    source = Holder(Offer(Ready(0, "c" * 64, regions), (*memory, memory[0])))
    server = HandoverServer(tmp_path, source)
    server.start()
    with pytest.raises(WeightsMismatch, match="b: 4 bytes of F32"):
        attach(server.path, device="cpu", timeout=10)
    assert source.ended.wait(10)
    server.close()
    for descriptor in memory:
        os.close(descriptor)
    gc.collect()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            assert "headrace-half" not in str(path.readlink())
    assert "headrace-half" not in Path("/proc/self/maps").read_text()


def test_a_gpu_that_is_not_there_is_refused_by_a_mocked_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Unsupported, match="device cuda:7: this process sees 2 GPUs"):
        attach(device="cuda:7")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("GPU-1", r"device GPU-1: this process sees .*; give loader and engine the same GPUs"),
        ("meta", "device meta: weights can be resident in host or CUDA memory"),
    ],
)
def test_a_device_that_cannot_be_mapped_is_refused(device: str, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        attach(device=device)


def test_weights_are_a_mapping_of_tensors(loader: Any) -> None:
    with attached(loader) as weights:
        assert set(weights) == {name for name, _, _ in SPECS}
        assert len(weights) == len(SPECS)
        assert weights["matrix"] is weights["matrix"]
        assert ("matrix" in weights, "other" in weights) == (True, False)
        with pytest.raises(KeyError):
            weights["other"]
        assert weights.nbytes == sum(tensor.nbytes for tensor in weights.values())
