"""The phases of a load as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format", complete events (ph X) and metadata (ph M); times in microseconds.
"""

from collections.abc import Iterator
from typing import Any

_MICROSECONDS = 1e6
_LOADER = 0

Event = dict[str, Any]


def chrome_trace(status: dict[str, Any]) -> dict[str, Any]:
    """Return the trace of a status document: one row for the loader, each rank and each engine.

    What has not ended is left out, but for engines, which last until now is unknown: they are
    instants.
    """
    events = [*_loader(status), *_ranks(status), *_engines(status)]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _loader(status: dict[str, Any]) -> Iterator[Event]:
    timeline = status["timeline"]
    yield _row(_LOADER, "loader")
    steps = (
        ("start", "processStarted", "manifestRead"),
        ("prepare", "manifestRead", "loadBegan"),
        ("load", "loadBegan", "resident"),
        ("make ready", "resident", "ready"),
        ("engine start", "resident", "engineReady"),
        ("publish compiled code", "engineReady", "engineCachePublished"),
    )
    for name, begin, end in steps:
        yield from _span(_LOADER, name, timeline.get(begin), timeline.get(end))


def _ranks(status: dict[str, Any]) -> Iterator[Event]:
    for rank in status["ranks"]:
        row = 1 + rank["rank"]
        yield _row(row, f"rank {rank['rank']} on {rank['device']}")
        times = rank["times"]
        facts = {key: rank[key] for key in ("totalBytes", "gibPerSecond", "path", "pathReason")}
        yield from _span(row, "start worker", times["workerStarted"], times["readBegan"])
        yield from _span(row, "read", times["readBegan"], times["lastByte"], facts)
        yield from _span(row, "verify", times["lastByte"], times["verified"])


def _engines(status: dict[str, Any]) -> Iterator[Event]:
    first = 2 + max((rank["rank"] for rank in status["ranks"]), default=-1)
    for number, engine in enumerate(status["engines"]):
        row, name = first + number, f"engine process {engine['pid']}, rank {engine['rank']}"
        yield _row(row, name)
        if engine["detached"] is None:
            begin = engine["attached"] * _MICROSECONDS
            yield {"name": "attached", "ph": "i", "s": "t", "pid": 0, "tid": row, "ts": begin}
        yield from _span(row, "attached", engine["attached"], engine["detached"])


def _row(row: int, name: str) -> Event:
    return {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}}


def _span(
    row: int, name: str, begin: float | None, end: float | None, facts: Event | None = None
) -> Iterator[Event]:
    if begin is None or end is None:
        return
    yield {
        "name": name,
        "ph": "X",
        "pid": 0,
        "tid": row,
        "ts": begin * _MICROSECONDS,
        "dur": (end - begin) * _MICROSECONDS,
        "args": facts or {},
    }
