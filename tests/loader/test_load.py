"""Loading: what ends in memory equals the files, and the status tells how it came there."""

import fcntl
import mmap
import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace_handover import attach
from headrace_handover.errors import HandoverError
from headrace_loader.__main__ import main
from headrace_loader.http_server import MAX_REQUESTS, REQUEST_SECONDS

TWO_PARTS = (
    (("a", "F32", (5000,)), ("b", "BF16", (3000,))),
    (("c", "U8", (70001,)), ("scale", "F32", ())),
)


def mapped(item: Any) -> mmap.mmap:
    return mmap.mmap(item.descriptor, item.region.nbytes, prot=mmap.PROT_READ)


@pytest.mark.parametrize(("algorithm", "ranks"), [("sha256", 2), ("multilinear64", 8)])
def test_every_rank_and_part_equals_its_file(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path, algorithm: str, ranks: int
) -> None:
    directory = tmp_path / "checkpoint"
    manifest = support.make_checkpoint(directory, ranks=ranks, parts=TWO_PARTS, algorithm=algorithm)
    loader = start_loader(directory, "--tensor-parallel-size", str(ranks))
    loader.until_phase("Ready")
    for rank in range(ranks):
        with attach(loader.socket, rank=rank, device="host", timeout=10) as attachment:
            parts = manifest.rank_parts(rank)
            assert [item.region.part for item in attachment.regions] == [0, 1]
            for item, part in zip(attachment.regions, parts, strict=True):
                with mapped(item) as memory:
                    expected = support.part_data(directory, part)
                    assert memory[: part.data_bytes] == expected
                    assert not any(memory[part.data_bytes :])
                names = [(tensor.name, tensor.offset) for tensor in item.region.tensors]
                assert names == [(entry.name, entry.offset) for entry in part.tensors]


def test_a_node_of_several_holds_its_own_ranks(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    manifest = support.make_checkpoint(directory, ranks=4)
    loader = start_loader(
        directory, "--tensor-parallel-size", "4", "--nodes", "2", "--node-rank", "1"
    )
    loader.until_phase("Ready")
    for rank in (2, 3):
        (part,) = manifest.rank_parts(rank)
        with attach(loader.socket, rank=rank, device="host", timeout=10) as attachment:
            (item,) = attachment.regions
            with mapped(item) as memory:
                assert memory[: part.data_bytes] == support.part_data(directory, part)
    with pytest.raises(HandoverError, match="holds ranks 2 to 3"):
        attach(loader.socket, rank=1, device="host", timeout=10)


@pytest.mark.parametrize(
    ("nodes", "node", "said"), [("3", "0", "must divide"), ("2", "2", "from 0 to 1")]
)
def test_nodes_that_share_no_ranks_evenly_are_refused(
    capsys: pytest.CaptureFixture[str], nodes: str, node: str, said: str
) -> None:
    arguments = ["--checkpoint", "x", "--backend", "host", "--tensor-parallel-size", "4"]
    with pytest.raises(SystemExit):
        main([*arguments, "--nodes", nodes, "--node-rank", node])
    assert said in capsys.readouterr().err


def test_memory_is_sealed(support: Any, start_loader: Callable[..., Any], tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    with attach(loader.socket, rank=0, device="host", timeout=60) as attachment:
        descriptor = attachment.regions[0].descriptor
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, 4096)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0)


def test_status_tells_sizes_path_rates_and_times(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    before = time.time()
    manifest = support.make_checkpoint(tmp_path / "checkpoint", ranks=2, parts=TWO_PARTS)
    loader = start_loader(
        tmp_path / "checkpoint", "--tensor-parallel-size", "2", "--path", "Prefer"
    )
    status = loader.until_phase("Ready")
    assert status["totalBytes"] == status["readBytes"] == manifest.total_bytes
    assert status["bytesPerSecond"] > 0
    assert status["etaSeconds"] == 0
    slowest = min(status["ranks"], key=lambda rank: rank["bytesPerSecond"])
    assert status["slowestRank"] == slowest["rank"]
    assert status["directPath"] == {
        "policy": "Prefer",
        "active": False,
        "reason": "HostBackend",
        "message": "host memory has no GPUDirect path",
    }
    assert status["checkpoint"]["architecture"] == "TestForCausalLM"
    timeline = status["timeline"]
    for rank in status["ranks"]:
        assert rank["resident"]
        assert rank["verifiedBytes"] == rank["readBytes"] == rank["totalBytes"]
        assert rank["path"] in ("O_DIRECT", "PageCache", "buffered")
        assert (rank["path"] == "buffered") == bool(rank["pathReason"])
        assert (rank["etaSeconds"], rank["gpu"]) == (0, None)
        times = rank["times"]
        order = [
            before - 0.1,
            timeline["processStarted"],
            max(times["workerStarted"], timeline["manifestRead"]),
            times["readBegan"],
            times["firstByte"],
            times["lastByte"],
            times["verified"],
            timeline["resident"],
            time.time(),
        ]
        assert order == sorted(order)


def test_metrics_agree_with_the_status(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint", "--path", "Prefer")
    loader.until_phase("Ready")
    with attach(loader.socket, rank=0, device="host", timeout=10):
        loader.until(lambda status: status["engines"])
        text = loader.get("/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["headrace_loader_phase", ("phase", "Ready")] == 1
    assert samples["headrace_loader_phase", ("phase", "Loading")] == 0
    rank = ("rank", "0")
    assert samples["headrace_loader_verified_bytes_total", rank] == manifest.total_bytes
    (way,) = [{**dict(key[1:])} for key in samples if key[0] == "headrace_loader_read_bytes_total"]
    assert (way["device"], way["path"] in ("O_DIRECT", "PageCache")) == ("host", True)
    assert samples["headrace_loader_eta_seconds", rank] == 0
    steps = {dict(key[1:])["step"] for key in samples if key[0].endswith("_step_duration_seconds")}
    assert steps == {"start", "prepare", "load", "worker", "read", "verify"}
    assert samples["headrace_loader_rank_resident", rank] == 1
    assert samples["headrace_loader_attached_engines",] == 1
    assert samples["headrace_loader_attachments_total",] == 1
    labels = (("device", "host"), rank, ("reason", "HostBackend"))
    assert samples["headrace_loader_direct_path_fallbacks_total", *labels] == 1


def test_prefer_falls_back_loudly_and_off_is_silent(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    prefer = start_loader(tmp_path / "checkpoint", "--path", "Prefer")
    off = start_loader(tmp_path / "checkpoint", "--path", "Off")
    prefer.until_phase("Ready")
    status = off.until_phase("Ready")
    (event,) = [event for event in prefer.events() if event["event"] == "path"]
    assert (event["level"], event["gpuDirectReason"]) == ("warning", "HostBackend")
    (event,) = [event for event in off.events() if event["event"] == "path"]
    assert "gpuDirect" not in event
    assert status["directPath"]["reason"] == "PolicyOff"
    assert "direct_path_fallbacks_total{" in prefer.get("/metrics").text
    assert "direct_path_fallbacks_total{" not in off.get("/metrics").text


def test_with_a_mocked_refusal_of_direct_io_reading_is_buffered_and_said_so(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    # File systems that refuse are rare (some FUSE and overlay ones), so open(2) refuses here.
    environment = support.shim(
        tmp_path,
        "import os\n"
        "real = os.open\n"
        "def refuse(path, flags, *rest, **named):\n"
        "    if flags & os.O_DIRECT:\n"
        "        raise OSError(22, 'Invalid argument')\n"
        "    return real(path, flags, *rest, **named)\n"
        "os.open = refuse\n"
        "del os.RWF_NOWAIT\n",  # nor does it tell what is cached
    )
    support.make_checkpoint(tmp_path / "checkpoint", parts=TWO_PARTS)
    loader = start_loader(tmp_path / "checkpoint", **environment)
    (rank,) = loader.until_phase("Ready")["ranks"]
    assert rank["path"] == "buffered"
    assert rank["pathReason"] == "the file system refuses O_DIRECT: Invalid argument"
    (event,) = [event for event in loader.events() if event["event"] == "path"]
    assert event["level"] == "warning"


def test_probes(support: Any, start_loader: Callable[..., Any], tmp_path: Path) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until(lambda _: True)
    assert loader.get("/healthz").code == 200
    loader.until_phase("Ready")
    ready = loader.get("/readyz")
    assert (ready.code, ready.text) == (200, "Ready: weights are resident and verified\n")
    assert loader.get("/nothing").code == 404


def test_probes_get_through_however_many_connections_are_idle(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until_phase("Ready")
    address = ("127.0.0.1", loader.port)
    with ExitStack() as stack:
        for _ in range(3):
            for _ in range(MAX_REQUESTS + 1):
                stack.enter_context(socket.create_connection(address)).send(b"GET /health")
            for path in ("/healthz", "/metrics"):
                assert loader.get(path).code == 200
        first = stack.enter_context(socket.create_connection(address))
        first.settimeout(2 * REQUEST_SECONDS)
        assert first.recv(1) == b""  # idle for too long


def test_not_ready_while_loading(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    held = support.hold(tmp_path / "checkpoint" / "model-rank-0-part-0.safetensors")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until_phase("Loading")
    ready = loader.get("/readyz")
    assert ready.code == 503
    assert re.fullmatch(r"Loading: reading weights \(0 of \d+ bytes\)\n", ready.text)
    assert loader.get("/healthz").code == 200
    begin = time.monotonic()
    assert loader.terminate() == 0
    assert time.monotonic() - begin < 5
    os.close(held)


def test_sigterm_ends_quickly_and_cleanly(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until_phase("Ready")
    with attach(loader.socket, rank=0, device="host", timeout=10) as attachment:
        begin = time.monotonic()
        assert loader.terminate() == 0
        assert time.monotonic() - begin < 5
        assert not loader.socket.exists()
        with mapped(attachment.regions[0]) as memory:
            assert any(memory)
    assert [event["event"] for event in loader.events()][-2:] == ["stopping", "stopped"]
    assert not loader.termination_log.exists()
