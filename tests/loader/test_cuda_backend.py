"""The CUDA backend where there is no GPU: a stand-in for the driver's library, see fake_cuda.c."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_handover import attach
from headrace_loader.cuda import native

HERE = Path(__file__).parent
DEVICE = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
# More than two buffers, several runs, and ends that are no whole words.
PARTS = ((("a", "U8", (9_000_003,)),), (("b", "F32", (300_000,)), ("c", "U8", (5,))))


@pytest.fixture(scope="module")
def fake_cuda(
    compile_c: Callable[[Path, Path], None], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """A directory with the stand-in, for LD_LIBRARY_PATH, and mover.so."""
    directory = tmp_path_factory.mktemp("cuda")
    compile_c(HERE / "fake_cuda.c", directory / "libcuda.so.1")
    compile_c(native.LIBRARY.with_suffix(".c"), directory / "mover.so")
    return str(directory)


def test_fake_cuda_holds_what_is_on_disk(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path, fake_cuda: str
) -> None:
    manifest = support.make_checkpoint(
        tmp_path / "checkpoint", ranks=2, parts=PARTS, chunk_bytes=65536, algorithm="multilinear64"
    )
    options = ("--backend=cuda", "--tensor-parallel-size=2", "--read-threads=3")
    loader = start_loader(tmp_path / "checkpoint", *options, LD_LIBRARY_PATH=fake_cuda)
    status = loader.until_phase("Ready")
    assert [rank["verifiedBytes"] for rank in status["ranks"]] == [
        sum(part.data_bytes for part in manifest.rank_parts(rank)) for rank in range(2)
    ]
    assert {rank["gpu"]["pciBusId"] for rank in status["ranks"]} == {"0000:ff:1f.7"}
    for rank in range(2):
        with attach(loader.socket, rank=rank, device=DEVICE, timeout=10) as attachment:
            for item, part in zip(attachment.regions, manifest.rank_parts(rank), strict=True):
                assert item.region.nbytes % (2 << 20) == 0
                content = os.pread(item.descriptor, part.data_bytes, 0)
                assert content == support.part_data(tmp_path / "checkpoint", part)


def test_fake_cuda_finds_a_flipped_bit(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path, fake_cuda: str
) -> None:
    manifest = support.make_checkpoint(
        tmp_path / "checkpoint", parts=PARTS, chunk_bytes=65536, algorithm="multilinear64"
    )
    part = manifest.parts[1]
    with (tmp_path / "checkpoint" / part.file).open("r+b") as file:
        file.seek(part.file_bytes - 1)  # in the word that is filled up with zeros
        last = file.read(1)[0]
        file.seek(part.file_bytes - 1)
        file.write(bytes([last ^ 0x80]))
    loader = start_loader(tmp_path / "checkpoint", "--backend=cuda", LD_LIBRARY_PATH=fake_cuda)
    assert loader.wait() == 65
    termination = loader.termination()
    assert termination["reason"] == "DigestMismatch"
    assert f"{part.file}: chunk 18 " in termination["message"]
    assert "tensors b, c)" in termination["message"]


def test_fake_cuda_fails_at_every_call_for_memory_and_for_defects(
    support: Any, tmp_path: Path, fake_cuda: str
) -> None:
    support.make_checkpoint(
        tmp_path / "checkpoint", parts=PARTS, chunk_bytes=65536, algorithm="multilinear64"
    )
    done = subprocess.run(
        [sys.executable, HERE / "cuda_faults.py", tmp_path / "checkpoint", f"{fake_cuda}/mover.so"],
        env=os.environ | {"LD_LIBRARY_PATH": fake_cuda},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = list(map(json.loads, done.stdout.splitlines()))
    undisturbed = [(line["end"], line["why"]) for line in lines if line["call"] == "none"]
    assert undisturbed == [
        *[("loaded", "PolicyOff")] * 3,
        ("loaded", ""),
        ("loaded", "FirstReadFailed"),
        ("loaded", "FileSystemUnsupported"),
        *[("DirectPathUnavailable", "")] * 2,
    ]
    opening = {"cuInit", "cuDeviceGet", "cuDeviceGetPCIBusId", "cuDevicePrimaryCtxRetain"}
    unopened = opening | {"cuCtxSetCurrent"}
    small = {"cuDeviceGetUuid_v2", "cuMemExportToShareableHandle"}  # where no memory can be missing
    for code, reason in ((2, "OutOfMemory"), (214, "GpuFailed")):
        always = [line for line in lines if not line["nth"]]
        ends = {line["call"]: line["end"] for line in always if line["code"] == code}
        assert len(ends) > 20
        # Only compiled code calls it: Python does the rest of the load, without it.
        assert ends.pop("cuStreamWaitEvent") == "loaded"
        for call, end in ends.items():
            expected = "GpuFailed" if call in small else reason
            assert end == ("BackendUnavailable" if call in unopened else expected), (call, code)

    assert [line["end"] for line in lines if line["code"] == 209] == ["BackendUnavailable"]
    # A part is done by compiled code then, and the rest again in Python: content is compared.
    once = {(line["call"], line["nth"]): line["end"] for line in lines if line["nth"]}
    assert once == dict.fromkeys(once, "loaded")
    assert len(once) == 12


def test_a_mocked_driver_that_lacks_a_call_is_too_old(
    support: Any,
    start_loader: Callable[..., Any],
    tmp_path: Path,
    compile_c: Callable[[Path, Path], None],
) -> None:
    (tmp_path / "old.c").write_text("int cuGetErrorName(void) { return 1; }")
    (tmp_path / "old").mkdir()
    compile_c(tmp_path / "old.c", tmp_path / "old" / "libcuda.so.1")
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(
        tmp_path / "checkpoint", "--backend=cuda", LD_LIBRARY_PATH=str(tmp_path / "old")
    )
    assert loader.wait() == 69
    termination = loader.termination()
    assert termination["reason"] == "BackendUnavailable"
    assert "the NVIDIA driver is too old: it has no cu" in termination["message"]


ENDED = """
import os, sys, time
from pathlib import Path
from headrace_loader.backends import BackendOptions, PathPolicy, open_backend
from headrace_loader.checkpoint import load_manifest
from headrace_loader.cuda import native
native.mover = lambda found=native.mover(Path(sys.argv[2])): found
class Failing:
    def path(self, report): print(threads() - before, flush=True); raise SystemError("path")
    def read(self, nbytes): pass
    def verified(self, nbytes): pass
def threads(): return len(os.listdir("/proc/self/task"))
backend = open_backend("cuda", BackendOptions(0, PathPolicy.OFF, 4, 4))
sources = load_manifest(Path(sys.argv[1])).sources(0)
regions = [backend.allocate(source.nbytes) for source in sources]
before = threads()
try:
    backend.fill(list(zip(regions, sources)), Failing())
except SystemError:
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    print(threads() - before)
"""


def test_threads_end_where_a_load_on_fake_cuda_ends_before_its_first_byte(
    support: Any, tmp_path: Path, fake_cuda: str
) -> None:
    support.make_checkpoint(
        tmp_path / "checkpoint", parts=PARTS, chunk_bytes=65536, algorithm="multilinear64"
    )
    command = [sys.executable, "-c", ENDED, tmp_path / "checkpoint", f"{fake_cuda}/mover.so"]
    environment = os.environ | {"LD_LIBRARY_PATH": fake_cuda}
    out = subprocess.check_output(command, env=environment, text=True, timeout=60)
    started, left = map(int, out.split())
    assert started > 1
    assert left == 0


def test_pinned_memory_is_bounded(fake_cuda: str) -> None:
    code = (
        "from headrace_loader.cuda.lanes import pinned_bytes\n"
        "print(*map(pinned_bytes, (1, 12, 128, 256)))"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": fake_cuda}
    out = subprocess.check_output([sys.executable, "-c", code], env=environment, timeout=60)
    assert list(map(int, out.split())) == [8 << 20, 96 << 20, 1 << 30, 1 << 30]


def test_fake_cuda_without_gpudirect_is_refused_where_it_is_required(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path, fake_cuda: str
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint", algorithm="multilinear64")
    options = ("--backend=cuda", "--path=Require")
    loader = start_loader(tmp_path / "checkpoint", *options, LD_LIBRARY_PATH=fake_cuda)
    assert loader.wait() == 69
    termination = loader.termination()
    assert termination["reason"] == "DirectPathUnavailable"
    assert termination["message"].startswith("--path Require: /proc/")


@pytest.mark.parametrize("policy", ["Off", "Prefer"])
def test_fake_cuda_tells_why_there_is_no_gpudirect(
    support: Any,
    start_loader: Callable[..., Any],
    tmp_path: Path,
    fake_cuda: str,
    policy: str,
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint", algorithm="multilinear64")
    options = ("--backend=cuda", f"--path={policy}")
    loader = start_loader(tmp_path / "checkpoint", *options, LD_LIBRARY_PATH=fake_cuda)
    direct = loader.until_phase("Ready")["directPath"]
    assert (direct["policy"], direct["active"]) == (policy, False)
    assert (direct["reason"] == "PolicyOff") == (policy == "Off")


def test_compiled_code_of_other_sources_is_not_used(
    compile_c: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    source = native.LIBRARY.with_suffix(".c").read_text()
    other = source.replace("struct slot {", "struct slot {\n  uint64_t more;", 1)
    assert other != source
    for name, text in (("other", other), ("older", source.replace("headrace_sizes", "sizes"))):
        (tmp_path / f"{name}.c").write_text(text)
        compile_c(tmp_path / f"{name}.c", tmp_path / f"{name}.so")
        with pytest.raises(OSError, match="was compiled of other sources"):
            native.Mover(tmp_path / f"{name}.so")
        assert native.mover(tmp_path / f"{name}.so") is None


def test_a_worker_on_fake_cuda_runs_near_its_gpu(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path, fake_cuda: str
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint", algorithm="multilinear64")
    held = support.hold(tmp_path / "checkpoint" / manifest.parts[0].file)
    near = min(os.sched_getaffinity(0))
    device = tmp_path / "sysfs" / "bus/pci/devices/0000:ff:1f.7"
    device.mkdir(parents=True)
    (device / "local_cpulist").write_text(f"{near}\n")
    environment = {"LD_LIBRARY_PATH": fake_cuda} | support.shim(
        tmp_path,
        "import pathlib\n"
        "from headrace_loader import topology\n"
        "real = topology.locality\n"
        f"topology.locality = lambda name: real(name, pathlib.Path({str(tmp_path / 'sysfs')!r}))\n",
    )
    loader = start_loader(tmp_path / "checkpoint", "--backend=cuda", **environment)
    loader.until_phase("Loading")
    children = Path(f"/proc/{loader.process.pid}/task/{loader.process.pid}/children")

    def runs_near(_status: Any) -> bool:
        (worker,) = children.read_text().split()
        status = Path(f"/proc/{worker}/status").read_text()
        return f"\nCpus_allowed_list:\t{near}\n" in status

    loader.until(runs_near)
    os.close(held)
    (rank,) = loader.until_phase("Ready")["ranks"]
    assert rank["gpu"]["cpus"] == str(near)
