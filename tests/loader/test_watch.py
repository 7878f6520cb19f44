"""`headrace load`: it runs a loader, watches one, and its trace can be opened."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace_loader import watch
from headrace_loader.trace import chrome_trace

HEADRACE = [sys.executable, "-m", "headrace_loader.command"]


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HEADRACE, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def url(loader: Any) -> str:
    return f"http://127.0.0.1:{loader.port}"


def test_a_load_is_watched_to_its_end(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    loader = start_loader(tmp_path / "checkpoint", "--tensor-parallel-size=2")
    out = headrace("load", "--watch", url(loader))
    total = loader.status()["totalBytes"]
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("Ready: weights are resident and verified; ")
    assert f"{total} bytes at " in out.stdout
    assert "slowest rank " in out.stdout
    assert "rank 0: 100%" in out.stderr
    assert "rank 1: 100%" in out.stderr
    for option in (("-o", "json"), ("--output=json",), ("--json",)):
        out = headrace("load", "--watch", url(loader), *option)
        assert (out.returncode, out.stderr) == (0, "")
        assert json.loads(out.stdout)["totalBytes"] == total


def test_bars_of_a_load_that_is_going_on(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    manifest = support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    held = support.hold(tmp_path / "checkpoint" / manifest.rank_parts(1)[0].file)
    loader = start_loader(tmp_path / "checkpoint", "--tensor-parallel-size=2")
    drawn = tmp_path / "drawn"
    with drawn.open("wb") as file:
        process = subprocess.Popen([*HEADRACE, "load", "--watch", url(loader)], stderr=file)
    deadline = time.monotonic() + 30
    while "rank 0: 100%" not in drawn.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    text = drawn.read_text()
    assert "rank 0: 100%" in text
    assert "rank 1:   0%" in text
    assert "rank 1: 100%" not in text
    assert process.poll() is None
    os.close(held)
    assert process.wait(60) == 0
    assert "rank 1: 100%" in drawn.read_text()


def test_bars_have_rate_and_time_left_from_the_loader(capsys: pytest.CaptureFixture[str]) -> None:
    """One who looks late, or at storage that hangs, sees no other numbers than the status has."""
    rank = {"rank": 0, "totalBytes": 4 << 30, "path": "PageCache", "device": "GPU-1"}
    stand = {"readBytes": 3 << 30, "bytesPerSecond": float(1 << 30), "etaSeconds": 61.0}
    opening = {"readBytes": 0, "bytesPerSecond": None, "etaSeconds": None, "path": None}
    slower = {"bytesPerSecond": float(1 << 29), "etaSeconds": 122.0}
    bars = watch.Bars()
    for news in (opening, opening, stand, stand | slower):
        bars.show({"ranks": [rank | news]})
        time.sleep(0.2)  # tqdm draws ten times a second at most
    bars.close()
    drawn = capsys.readouterr().err
    assert "rank 0:   0%" in drawn
    assert "0.00B/4.00GB, ?B/s, ? left\r" in drawn
    assert "rank 0:  75%" in drawn
    assert "3.00GB/4.00GB, 1.00GB/s, 01:01 left, PageCache GPU-1\r" in drawn
    assert "3.00GB/4.00GB, 512MB/s, 02:02 left, PageCache GPU-1" in drawn


def test_a_failed_load_is_named(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    failed = loader.until_phase("Ready") | {
        "phase": "Failed",
        "reason": "DigestMismatch",
        "message": "part 0",
    }
    answers = iter([OSError("not yet"), failed])

    def ask() -> Any:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert watch.summary(watch.watch(ask, 10)) == "Failed: DigestMismatch: part 0"


def test_a_proxy_is_not_asked_for_what_is_here(
    monkeypatch: pytest.MonkeyPatch,
    support: Any,
    start_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint")
    loader = start_loader(tmp_path / "checkpoint")
    loader.until_phase("Ready")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert watch.fetch(url(loader))["phase"] == "Ready"
    with pytest.raises(OSError, match="refused"):
        watch.fetch(f"http://loader.invalid:{loader.port}")  # by the proxy


def test_nobody_there() -> None:
    out = headrace("load", "--watch", "http://127.0.0.1:9", "--timeout", "0.1")
    assert out.returncode == os.EX_UNAVAILABLE
    assert "http://127.0.0.1:9: no status within 0.1 s" in out.stderr
    assert "Traceback" not in out.stderr


def heed_interrupts() -> None:
    """A shell lets what it runs in the background ignore them, the tests included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_watching_ends_on_ctrl_c() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [*HEADRACE, "load", "--watch", url]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        ) as process:
            server.accept()[0].close()  # it watches
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said


def test_something_else_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [*HEADRACE, "load", "--watch", url, "--timeout", "0.1"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                server.settimeout(0.2)
                with contextlib.suppress(TimeoutError), server.accept()[0] as connection:
                    connection.recv(1000)
                    connection.sendall(b"220 mail.example ESMTP\r\n")
            assert process.stderr is not None
            said = process.stderr.read()
    assert process.returncode == os.EX_UNAVAILABLE
    assert "the answer is no loader's status" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["load", "--watch", "localhost:9400"], "must be http://HOST:PORT"),
        (["load", "--watch", "http://h:1", "--what"], "--what"),
        (["load", "--watch", "http://h:1", "--timeout=nan"], "nan: must be above 0"),
        (["load", "--watch", "http://h:1", "--timeout=-1"], "-1: must be above 0"),
        (["load", "--watch", "http://h:1", "-o", "xml"], "--output"),
        (["load"], "--checkpoint"),
        (["verify", "x", "--what"], "--what"),
        (["lead"], "lead"),
    ],
)
def test_usage(arguments: list[str], word: str) -> None:
    out = headrace(*arguments)
    assert out.returncode == os.EX_USAGE
    assert word in out.stderr
    assert "Traceback" not in out.stderr


def test_load_without_watch_is_a_loader(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    runtime = f"--runtime-dir={tmp_path}"
    out = headrace("load", f"--checkpoint={missing}", "--backend=host", "--port=1", runtime)
    assert out.returncode != 0
    assert json.loads(out.stdout.splitlines()[-1])["event"] == "failed"


def test_the_trace_has_every_phase_in_order(
    support: Any, start_loader: Callable[..., Any], tmp_path: Path
) -> None:
    support.make_checkpoint(tmp_path / "checkpoint", ranks=2)
    loader = start_loader(tmp_path / "checkpoint", "--tensor-parallel-size=2")
    status = loader.until_phase("Ready")
    trace = json.loads(loader.get("/v1/trace").text)
    events = trace["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert rows == {0: "loader", 1: "rank 0 on host", 2: "rank 1 on host"}
    spans = {(e["tid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert [name for row, name in spans if row == 0] == [
        "start",
        "prepare",
        "load",
        "make ready",
    ]
    assert {name for row, name in spans if row == 1} == {"start worker", "read", "verify"}
    assert all(event["dur"] >= 0 for event in spans.values())
    for rank in status["ranks"]:  # those of the next node, and an engine
        rank["rank"] += 2
    status["engines"] = [{"pid": 1, "rank": 2, "attached": 1.0, "detached": None}]
    rows = [e["tid"] for e in chrome_trace(status)["traceEvents"] if e["ph"] == "M"]
    assert sorted(rows) == [0, 3, 4, 5]
    end = spans[0, "load"]["ts"] + spans[0, "load"]["dur"]
    assert end == pytest.approx(status["timeline"]["resident"] * 1e6)
    assert spans[1, "read"]["args"]["totalBytes"] == status["ranks"][0]["totalBytes"]
