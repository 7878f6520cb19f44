"""Shows a loader at work in a terminal: a bar per tensor parallel rank, then where it ended.

It asks the loader's /v1/status over HTTP, so it runs wherever the port can be reached:
beside the loader, or through `kubectl port-forward POD 9400`.
"""

import argparse
import json
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from headrace_checkpoint import signals
from headrace_checkpoint.report import ArgumentParser, add_form
from headrace_loader.state import Phase

_POLL_SECONDS = 0.2
_REQUEST_SECONDS = 5.0
_MAX_BYTES = 1 << 20
_MAX_SECONDS = 86400.0
_INTERRUPTED = 128 + signal.SIGINT
_HERE = ("localhost", "127.0.0.1", "::1")
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}B/{total_fmt}B{postfix}"
_OVER = (Phase.READY, Phase.ORPHANED, Phase.FAILED)

Status = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Watch until the loader is ready (0) or failed (65), or cannot be reached in time (69)."""
    parser = ArgumentParser(prog="headrace load --watch", description=__doc__)
    parser.add_argument("url", type=_url, help="of the loader's status server")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, help="seconds to wait for an answer"
    )
    add_form(parser, "--output")
    options = parser.parse_args(arguments)
    bars = Bars() if options.form == "text" else None
    try:
        signals.release()
        status = watch(lambda: fetch(options.url), options.timeout, bars)
    except TimeoutError as error:
        print(f"{options.url}: {error}; is a loader running there?", file=sys.stderr)
        return os.EX_UNAVAILABLE
    except KeyboardInterrupt:
        return _INTERRUPTED
    print(summary(status) if bars else json.dumps(status))
    return 0 if status["phase"] != Phase.FAILED else os.EX_DATAERR


def watch(ask: Callable[[], Status], timeout: float, bars: "Bars | None" = None) -> Status:
    """Draw bars, if any, on standard error until the load is over; returns the last status.

    `ask` returns a status document or raises OSError. Raises TimeoutError when it has not
    answered for `timeout` seconds.
    """
    try:
        while True:
            status = _answer(ask, timeout)
            if bars is not None:
                bars.show(status)
            if status["phase"] in _OVER:
                return status
            time.sleep(_POLL_SECONDS)
    finally:
        if bars is not None:
            bars.close()


class Bars:
    """One bar per rank. On something that is no terminal tqdm draws lines now and then."""

    def __init__(self) -> None:
        self._bars: dict[int, tqdm[Any]] = {}

    def show(self, status: Status) -> None:
        """Bring the bars to what a status says."""
        for rank in status["ranks"]:
            number: int = rank["rank"]
            if number not in self._bars:
                self._bars[number] = tqdm(
                    total=rank["totalBytes"],
                    position=len(self._bars),
                    desc=f"rank {number}",
                    unit_scale=True,
                    unit_divisor=1024,
                    miniters=0,  # also where nothing arrives, for then the rate falls
                    bar_format=_BAR,
                )
            bar = self._bars[number]
            bar.set_postfix_str(_pace(rank), refresh=False)
            bar.update(rank["readBytes"] - bar.n)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in self._bars.values():
            bar.close()


def _pace(rank: Status) -> str:
    """Return rate, time left, path and device, as the loader has them: tqdm sees only a part."""
    rate, left = rank["bytesPerSecond"], rank["etaSeconds"]
    return ", ".join(
        [
            "?B/s" if rate is None else tqdm.format_sizeof(rate, "B/s", 1024),
            f"{'?' if left is None else tqdm.format_interval(left)} left",
            *([f"{rank['path']} {rank['device']}"] if rank["path"] else []),
        ]
    )


def summary(status: Status) -> str:
    """Return one line about the end: phase, bytes, rate, and the slowest rank."""
    if status["phase"] == Phase.FAILED:
        return f"Failed: {status['reason']}: {status['message']}"
    line = f"{status['phase']}: {status['message']}"
    slowest = next((r for r in status["ranks"] if r["rank"] == status["slowestRank"]), None)
    if slowest is not None:
        line += (
            f"; {status['totalBytes']} bytes at {status['gibPerSecond']} GiB/s, "
            f"slowest rank {slowest['rank']} at {slowest['gibPerSecond']} GiB/s"
        )
    return line


def fetch(url: str) -> Status:
    """Return the status document of a loader. Raises OSError, also for an answer that is none."""
    try:
        with _opener(url).open(f"{url}/v1/status", timeout=_REQUEST_SECONDS) as response:
            status = json.loads(response.read(_MAX_BYTES))
    except (ValueError, HTTPException):
        status = None
    if not isinstance(status, dict) or "ranks" not in status:
        raise OSError("the answer is no loader's status")
    return status


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Return what opens URLs, without a proxy where this machine is meant."""
    is_here = urlsplit(url).hostname in _HERE
    return urllib.request.build_opener(urllib.request.ProxyHandler({} if is_here else None))


def _answer(ask: Callable[[], Status], timeout: float) -> Status:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return ask()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no status within {timeout:g} s: {error}") from None
            time.sleep(_POLL_SECONDS)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds") from None
    if not 0 < value <= _MAX_SECONDS:  # neither is NaN
        raise argparse.ArgumentTypeError(f"{text}: must be above 0, at most {_MAX_SECONDS:g}")
    return value


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme != "http" or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text}: must be http://HOST:PORT")
    return text.rstrip("/")
