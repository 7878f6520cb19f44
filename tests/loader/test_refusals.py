"""Bad input and bad surroundings: a reason in the termination log, never a traceback."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_handover import Refused, attach


def failed(loader: Any, code: int) -> tuple[str, str]:
    """The loader ends by itself; returns the reason and message it leaves."""
    assert loader.wait() == code, loader.log.read_text()
    log = loader.log.read_text()
    assert "Traceback" not in log
    termination = loader.termination()
    event = loader.events()[-1]
    assert (event["event"], event["level"]) == ("failed", "error")
    assert (event["reason"], event["message"]) == (termination["reason"], termination["message"])
    return termination["reason"], termination["message"]


def test_no_checkpoint(start_loader: Callable[..., Any], tmp_path: Path) -> None:
    reason, message = failed(start_loader(tmp_path / "nothing"), 65)
    assert reason == "CheckpointMissing"
    assert str(tmp_path / "nothing") in message


def test_a_part_that_is_missing(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "checkpoint/model-rank-0-part-0.safetensors").unlink()
    reason, message = failed(start_loader(tmp_path / "checkpoint"), 65)
    assert reason == "CheckpointMissing"
    assert "model-rank-0-part-0.safetensors" in message


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "directory"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("manifest.json", "ManifestInvalid"),
        ("model-rank-0-part-0.safetensors", "DigestMismatch"),
    ],
)
def test_what_is_no_file(
    support: Any,
    start_loader: Callable[..., Any],
    tmp_path: Path,
    name: str,
    reason: str,
    make: Callable[[Path], None],
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / name
    path.unlink()
    make(path)
    found, message = failed(start_loader(tmp_path / "checkpoint"), 65)
    assert found == reason
    assert f"{path}: must be a regular file; shard the model again" in message


def test_a_manifest_that_breaks_a_rule(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/manifest.json"
    document = json.loads(path.read_bytes())
    document["parts"][0]["dataOffset"] = 100
    path.write_text(json.dumps(document))
    reason, message = failed(start_loader(tmp_path / "checkpoint"), 65)
    assert reason == "ManifestInvalid"
    assert "parts[0].dataOffset" in message


def test_another_number_of_ranks(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    for given, size in (((), 1), (("--tensor-parallel-size", "4"), 4)):
        reason, message = failed(start_loader(tmp_path / "checkpoint", *given), 65)
        assert reason == "ParallelismMismatch"
        assert message == (
            f"--tensor-parallel-size {size}: {tmp_path}/checkpoint has 2 ranks: the two must be "
            "equal; start loader and engine with --tensor-parallel-size 2, or shard the model "
            f"again for {size}"
        )


def test_pipeline_stages(support: Any, start_loader: Callable[..., Any], tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    path = tmp_path / "checkpoint/manifest.json"
    document = json.loads(path.read_bytes())
    document["parallelism"] |= {"tensor": 1, "pipeline": 2}
    path.write_text(json.dumps(document))
    reason, message = failed(start_loader(tmp_path / "checkpoint"), 65)
    assert reason == "ParallelismMismatch"
    assert "pipeline parallel size 2: loaders serve 1 alone; shard the model again" in message


@pytest.mark.parametrize("algorithm", ["sha256", "multilinear64"])
@pytest.mark.parametrize(("position", "chunk", "tensor"), [(0, 0, "a"), (12288, 3, "b")])
def test_a_flipped_bit(
    support: Any,
    start_loader: Callable[..., Any],
    tmp_path: Path,
    algorithm: str,
    position: int,
    chunk: int,
    tensor: str,
) -> None:
    specs = (("a", "U8", (12288,)), ("b", "U8", (4096,)))
    manifest = support.make_checkpoint(tmp_path / "checkpoint", parts=(specs,), algorithm=algorithm)
    part = manifest.parts[0]
    with (tmp_path / "checkpoint" / part.file).open("r+b") as file:
        file.seek(part.data_offset + position)
        byte = file.read(1)[0]
        file.seek(part.data_offset + position)
        file.write(bytes([byte ^ 0x10]))
    reason, message = failed(start_loader(tmp_path / "checkpoint"), 65)
    assert reason == "DigestMismatch"
    assert f"{part.file}: chunk {chunk} " in message
    assert f"tensors {tensor})" in message


def test_nothing_is_served_of_a_rank_that_is_good_while_another_is_not(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    bad = manifest.rank_parts(1)[0]
    path = tmp_path / "checkpoint" / bad.file
    content = bytearray(path.read_bytes())
    content[bad.data_offset] ^= 1
    path.write_bytes(content)
    held = [support.hold(path)]
    loader = start_loader(tmp_path / "checkpoint", "--tensor-parallel-size", "2")

    def unblock(_: Any) -> None:
        if held and loader.status()["ranks"][0]["resident"]:
            os.close(held.pop())

    with pytest.raises(Refused, match="DigestMismatch"):
        attach(loader.socket, rank=0, device="host", timeout=60, on_progress=unblock)
    assert not held
    assert failed(loader, 65)[0] == "DigestMismatch"


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--port", "abc", "abc: must be a whole number from 1 to 65535"),
        ("--read-threads", "0", "0: must be a whole number from 1 to 256"),
    ],
)
def test_wrong_numbers(tmp_path: Path, option: str, value: str, rule: str) -> None:
    command = [sys.executable, "-m", "headrace_loader", "--backend", "host", option, value]
    done = subprocess.run(
        [*command, "--checkpoint", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == os.EX_USAGE
    assert f"{option}: {rule}" in done.stderr


def test_a_part_that_was_cut(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / manifest.parts[0].file
    os.truncate(path, path.stat().st_size - 1)
    reason, message = failed(start_loader(tmp_path / "checkpoint"), 65)
    assert reason == "DigestMismatch"
    assert f"{path.stat().st_size} bytes" in message


def test_require_is_refused_on_host_memory(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint", "--path", "Require")
    reason, message = failed(loader, 69)
    assert reason == "DirectPathUnavailable"
    assert "--path Require" in message


def test_a_backend_that_cannot_be_had(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    reason, message = failed(start_loader(tmp_path / "checkpoint", "--backend", "cuda"), 69)
    assert reason == "BackendUnavailable"
    assert "--backend cuda" in message


def test_weights_larger_than_memory(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint", chunk_bytes=1 << 30)
    document = json.loads(manifest.to_json())
    part = document["parts"][0]
    huge = 1 << 45
    part["tensors"] = [{"name": "a", "dtype": "U8", "shape": [huge], "offset": 0, "bytes": huge}]
    part["dataBytes"], part["bytes"] = huge, part["dataOffset"] + huge
    part["chunkDigests"] = ["0" * 64] * (huge >> 30)
    document["totalBytes"] = huge
    (tmp_path / "checkpoint/manifest.json").write_text(json.dumps(document))
    reason, message = failed(start_loader(tmp_path / "checkpoint"), 75)
    assert reason == "OutOfMemory"
    assert f"{huge} bytes of weights" in message


def test_a_waiting_engine_is_told_why(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / manifest.parts[0].file
    os.truncate(path, 10)
    held = [support.hold(path)]
    loader = start_loader(tmp_path / "checkpoint")

    def unblock(_: Any) -> None:
        while held:
            os.close(held.pop())

    with pytest.raises(Refused, match="DigestMismatch"):
        attach(loader.socket, rank=0, device="host", timeout=60, on_progress=unblock)
    assert failed(loader, 65)[0] == "DigestMismatch"


def test_what_does_not_open_in_time(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    held = support.hold(tmp_path / "checkpoint" / manifest.rank_parts(1)[0].file)
    soon = support.shim(
        tmp_path, "from headrace_loader import supervisor\nsupervisor._OPENING_SECONDS = 2.0\n"
    )
    size = ("--tensor-parallel-size", "2")
    loader = start_loader(tmp_path / "checkpoint", *size, **soon)
    reason, message = failed(loader, 69)
    os.close(held)
    assert reason == "BackendUnavailable"
    assert message.startswith(
        "rank 1: GPU, cuFile and the checkpoint's files were not open after 2 s"
    )


def test_a_loader_is_unharmed_by_thousands_of_connections(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until_phase("Ready")
    process = Path(f"/proc/{loader.process.pid}")
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.connect(str(loader.socket))
        assert len(list((process / "task").iterdir())) < 100
        assert len(list((process / "fd").iterdir())) < 200
        refused = 'headrace_loader_refused_connections_total{reason="TooManyConnections"}'
        loader.until(lambda _: refused in loader.get("/metrics").text)
    with attach(loader.socket, rank=0, device="host", timeout=10) as attachment:
        assert len(attachment.regions) == 1


def test_a_port_that_is_taken(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        loader = start_loader(tmp_path / "checkpoint", "--host=127.0.0.1")
        loader.kill()
        loader.termination_log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "headrace_loader", "--backend=host", f"--port={port}"]
        command += [f"--checkpoint={tmp_path}/checkpoint", f"--runtime-dir={tmp_path}/run"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert out.returncode == 69
    assert f"--port {port}: Address already in use" in out.stdout


def test_a_runtime_directory_that_cannot_be_written(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("not a directory")
    loader = start_loader(tmp_path / "checkpoint", f"--runtime-dir={tmp_path}/file")
    reason, message = failed(loader, 69)
    assert reason == "RuntimeDirectoryUnusable"
    assert "--runtime-dir" in message


def test_usage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace_loader", "--checkpoint", "x"]
    for wrong in (["--backend", "tpu"], ["--backend", "host", "--read-threads", "0"], []):
        out = subprocess.run(
            [*command, *wrong], capture_output=True, text=True, timeout=60, check=False
        )
        assert out.returncode == 64, out
        assert "Traceback" not in out.stderr


@pytest.fixture
def hung(support: Any, tmp_path: Path) -> tuple[Path, dict[str, str], Path]:
    """A checkpoint of two parts, a shim by which the second's reads hang, and what ends that."""
    two = ((("a", "U8", (300_000,)),), (("b", "U8", (200_000,)),))
    support.make_checkpoint(tmp_path / "checkpoint", parts=two, chunk_bytes=65536)
    go = tmp_path / "go"
    environment = support.shim(
        tmp_path,
        "import os, time\n"
        "from headrace_loader import supervisor\n"
        "supervisor._STALLED_SECONDS = float(os.environ.get('STALLED', '60'))\n"
        "real = os.preadv\n"
        "def hang(descriptor, buffers, *rest):\n"
        "    second = 'part-1' in os.readlink(f'/proc/self/fd/{descriptor}')\n"
        "    second = second and isinstance(buffers[0], memoryview)\n"  # no probe
        f"    while second and not os.path.exists({str(go)!r}):\n"
        "        time.sleep(0.01)\n"
        "    return real(descriptor, buffers, *rest)\n"
        "os.preadv = hang\n",
    )
    return tmp_path / "checkpoint", environment, go


def test_with_a_mocked_hang_of_storage_the_rate_falls_and_engines_see_what_there_is(
    hung: tuple[Path, dict[str, str], Path], start_loader: Callable[..., Any]
) -> None:
    checkpoint, shim, go = hung
    loader = start_loader(checkpoint, "--read-threads=1", **shim)
    first = loader.until(lambda status: status["readBytes"] == 65536)
    seen: list[int] = []

    def release(loading: Any) -> None:
        seen.append(loading.loaded_bytes)
        go.touch()

    later = loader.status()
    for status in (first, later):
        (rank,) = status["ranks"]
        assert (status["readBytes"], status["totalBytes"]) == (65536, 500_000)
        elapsed = 65536 / rank["bytesPerSecond"]
        assert rank["etaSeconds"] == pytest.approx(elapsed * (500_000 / 65536 - 1), abs=0.06)
        assert 0 < elapsed < time.time() - rank["times"]["readBegan"]
    for slower, rate in ((later, first), (later["ranks"][0], first["ranks"][0])):
        assert slower["bytesPerSecond"] < rate["bytesPerSecond"]
    with attach(loader.socket, rank=0, device="host", timeout=60, on_progress=release):
        pass
    assert seen[0] == 65536
    assert loader.until_phase("Ready")["etaSeconds"] == 0


def test_with_a_mocked_hang_of_storage_a_load_ends_with_a_reason(
    hung: tuple[Path, dict[str, str], Path], start_loader: Callable[..., Any]
) -> None:
    checkpoint, shim, _ = hung
    reason, message = failed(start_loader(checkpoint, "--read-threads=1", **shim, STALLED="3"), 75)
    assert reason == "StorageError"
    assert message.startswith("rank 0 (65536 of 500000 bytes): no byte arrived for 3 s")


def test_a_manifest_that_does_not_open_in_time(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    held = support.hold(tmp_path / "checkpoint" / "manifest.json")
    soon = support.shim(
        tmp_path, "from headrace_loader import supervisor\nsupervisor._OPENING_SECONDS = 2.0\n"
    )
    loader = start_loader(tmp_path / "checkpoint", **soon)
    reason, message = failed(loader, 75)
    os.close(held)
    assert reason == "StorageError"
    assert message.startswith(f"--checkpoint {tmp_path}/checkpoint: its manifest was not read")


def test_sigterm_ends_a_loader_whose_manifest_hangs(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    held = support.hold(tmp_path / "checkpoint" / "manifest.json")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until_phase("Starting")
    begin = time.monotonic()
    assert loader.terminate() == 0
    assert time.monotonic() - begin < 10
    os.close(held)
