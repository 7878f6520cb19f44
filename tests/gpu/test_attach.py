"""Weights in GPU memory as torch tensors: shared, read-only, and alive as long as anyone maps them.

torch alone is the engine here.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace_engine import attach
from headrace_handover import MappableRegion, Region

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

ENGINES = Path(__file__).parents[2] / "docs/engines.md"
MIB = 1 << 20
SIZE = 512 * MIB
SPECS = (
    ("matrix", "BF16", (1024, 256)),
    ("float8", "F8_E4M3", (512, 64)),
    ("vector", "F32", (64,)),
    ("bytes", "U8", (259,)),
    ("empty", "F16", (0, 4)),
    ("scale", "F32", ()),
)


@pytest.fixture(scope="module")
def checkpoint(support: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "made"
    support.make_checkpoint(directory, parts=(SPECS,), algorithm="multilinear64")
    return directory


@pytest.fixture(scope="module")
def large(support: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "large"
    parts = ((("a", "U8", (SIZE,)),),)
    support.make_checkpoint(directory, parts=parts, chunk_bytes=4 * MIB, algorithm="multilinear64")
    return directory


@pytest.fixture(scope="module")
def loader(start_loader: Callable[..., Any], checkpoint: Path) -> Any:
    started = start_loader(checkpoint, "--backend", "cuda")
    started.until_phase("Ready")
    return started


def raw(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy())


def data_of(checkpoint: Path) -> bytes:
    return next(checkpoint.glob("*.safetensors")).read_bytes()[4096:]


def test_tensors_equal_the_file(loader: Any, checkpoint: Path) -> None:
    weights = attach(loader.socket, device="cuda")
    data = data_of(checkpoint)
    for entry in weights.attachment.ready.regions[0].tensors:
        tensor = weights[entry.name]
        assert tensor.is_cuda
        assert tensor.shape == entry.shape
        assert raw(tensor) == data[entry.offset : entry.offset + entry.nbytes]
    assert weights["matrix"].dtype == torch.bfloat16
    assert weights["float8"].dtype == torch.float8_e4m3fn
    assert [copy.name for copy in weights.copies] == ["scale"]
    weights.attachment.close()


def test_views_have_storages_of_their_own_size_and_take_no_memory(loader: Any) -> None:
    weights = attach(loader.socket, device="cuda")
    for name in ("matrix", "float8", "vector"):
        assert weights[name].untyped_storage().nbytes() == weights[name].nbytes
    first, last = weights["matrix"], weights["vector"]
    assert 0 < last.data_ptr() - first.data_ptr() < 2 * MIB  # one mapping
    product = first[:64].float() @ first[:64].float().T
    assert torch.isfinite(product.nan_to_num()).all()
    weights.attachment.close()


def test_the_gpu_is_found_by_its_uuid(loader: Any) -> None:
    device = loader.status()["ranks"][0]["device"]
    assert device.startswith("GPU-")
    weights = attach(loader.socket, device=device)
    assert weights["matrix"].is_cuda
    weights.attachment.close()


def test_tensors_keep_their_memory_mapped_and_the_last_one_unmaps_it(
    large: Path, start_loader: Callable[..., Any], used_mib: Callable[[], int]
) -> None:
    loader = start_loader(large, "--backend", "cuda")
    weights = attach(loader.socket, device="cuda")
    tensor = weights["a"]
    before = raw(tensor[-1000:])
    loader.kill()
    weights.attachment.close()
    del weights
    held = used_mib()
    assert raw(tensor[-1000:]) == before
    del tensor
    assert used_mib() <= held - SIZE // MIB


def test_a_descriptor_that_is_no_gpu_memory_is_refused() -> None:
    from headrace_engine.cuda_mapping import CudaMapping
    from headrace_engine.errors import MappingFailed

    descriptor = os.memfd_create("host")
    os.ftruncate(descriptor, 2 * MIB)
    item = MappableRegion(Region(3, 2 * MIB, 2 * MIB, ()), descriptor)
    with pytest.raises(MappingFailed, match=r"part 3: its 2097152 bytes .* cuMem"):
        CudaMapping(item, 0)
    os.close(descriptor)


def test_the_example_of_the_documentation_runs(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    match = re.search(r"```python\n(.*?)```", ENGINES.read_text(), re.DOTALL)
    assert match is not None
    specs = (("up.weight", "F32", (256, 64)), ("down.weight", "F32", (64, 256)))
    support.make_checkpoint(tmp_path / "made", parts=(specs,), algorithm="multilinear64")
    loader = start_loader(tmp_path / "made", "--backend", "cuda")
    out = subprocess.run(
        [sys.executable, "-c", match[1]],
        env=os.environ | {"HEADRACE_SOCKET": str(loader.socket)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "device='cuda:0'" in out.splitlines()[-1]


WRITE = """
import sys, torch
from headrace_engine import attach
tensor = attach(sys.argv[1], device="cuda")["vector"]
{action}
torch.cuda.synchronize()
"""
ACTIONS = {
    "read": "assert torch.isfinite(tensor.nan_to_num().sum())",
    "fill": "tensor.fill_(1)",
    "copy": "tensor.copy_(torch.ones_like(tensor))",
    "index": "tensor[0] += 1",
}


@pytest.fixture(scope="module")
def endings(loader: Any) -> dict[str, tuple[int, str]]:
    """Exit code and output of a process per action."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", WRITE.format(action=action), str(loader.socket)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, action in ACTIONS.items()
    }
    outputs = {name: process.communicate(timeout=200)[0] for name, process in processes.items()}
    return {name: (process.returncode, outputs[name]) for name, process in processes.items()}


def test_reading_works(endings: dict[str, tuple[int, str]]) -> None:
    assert endings["read"] == (0, "")


@pytest.mark.parametrize(
    ("action", "error"),
    [
        ("fill", "an illegal memory access was encountered"),
        ("index", "an illegal memory access was encountered"),
        ("copy", "invalid argument"),  # no kernel: the driver itself refuses
    ],
)
def test_a_write_faults(
    endings: dict[str, tuple[int, str]], loader: Any, checkpoint: Path, action: str, error: str
) -> None:
    code, output = endings[action]
    assert code == 1
    assert f"CUDA error: {error}" in output
    weights = attach(loader.socket, device="cuda")
    assert raw(weights["vector"]) in data_of(checkpoint)  # nothing was changed
    weights.attachment.close()


def test_lifetimes(
    large: Path,
    start_loader: Callable[..., Any],
    start_engine: Callable[..., Any],
    used_mib: Callable[[], int],
) -> None:
    """One story, since each of these processes takes seconds: who is killed, who lives on."""
    empty = used_mib()
    expected = int(np.frombuffer(data_of(large), np.uint8).sum(dtype=np.int64))
    loader = start_loader(large, "--backend", "cuda")
    loader.until_phase("Ready")

    engines = [start_engine("holder.py", loader.socket) for _ in range(2)]
    for engine in engines:  # two engines, one copy, and nothing of its size besides
        ready = engine.ready()
        assert (ready["bytes"], ready["copied_bytes"], ready["torch_bytes"]) == (SIZE, 0, 0)
        assert ready["device_bytes"] < 64 * MIB
        assert engine.ask() == expected

    engines[0].kill()  # an engine dies: the weights stay, and another one attaches
    loader.until(lambda status: any(engine["detached"] for engine in status["engines"]))
    again = start_engine("holder.py", loader.socket)
    again.ready()
    assert again.ask() == expected

    loader.kill()  # the loader dies: engines serve on
    assert engines[1].ask() == expected
    assert again.ask() == expected

    held = used_mib()
    loader.start()  # it comes back while engines live: no second copy
    status = loader.until_phase("Orphaned")
    assert status["readBytes"] == 0
    assert used_mib() - held < SIZE // MIB // 2
    engines[1].kill()
    assert loader.status()["phase"] == "Orphaned"
    assert again.ask() == expected
    again.kill()
    status = loader.until_phase("Ready")
    assert status["readBytes"] == SIZE

    last = start_engine("holder.py", loader.socket)
    last.ready()
    assert last.ask() == expected
    loader.kill()  # both die: the memory is free again
    last.kill()
    deadline = time.monotonic() + 30
    while used_mib() > empty + SIZE // MIB // 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
