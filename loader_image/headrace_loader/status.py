"""The loader's state as the JSON of /v1/status."""

from headrace_loader.state import Attachment, LoaderState, RankState

_GIB = 1 << 30


def status(state: LoaderState) -> dict[str, object]:
    """Return the status document. Sizes in bytes, times as Unix times in seconds."""
    with state.reading():
        rate, slowest = state.bytes_per_second, state.slowest
        return {
            "phase": state.phase,
            "reason": state.reason,
            "message": state.message,
            "backend": state.settings.backend,
            "tensorParallelSize": state.settings.tensor_parallel_size,
            "checkpoint": _checkpoint(state),
            "totalBytes": state.total_bytes,
            "readBytes": state.read_bytes,
            "bytesPerSecond": rate,
            "gibPerSecond": _gib(rate),
            "etaSeconds": _tenths(state.eta_seconds),
            "slowestRank": slowest.rank if slowest else None,
            "directPath": _direct_path(state),
            "ranks": [_rank(rank) for rank in state.ranks],
            "engines": [_attachment(item) for item in (*state.ended, *state.attached.values())],
            "engineCache": {
                "state": state.engine_cache.phase,
                "message": state.engine_cache.message,
                "bytes": state.engine_cache.nbytes,
            },
            "timeline": {"processStarted": state.process_started, **state.timeline},
        }


def _checkpoint(state: LoaderState) -> dict[str, object] | None:
    if state.checkpoint is None:
        return None
    return {
        "directory": str(state.checkpoint.directory),
        "architecture": state.checkpoint.manifest.architecture,
        "manifestDigest": state.checkpoint.digest,
    }


def _direct_path(state: LoaderState) -> dict[str, object]:
    """Report GPUDirect over all ranks: active only where every rank uses it."""
    reports = [rank.path for rank in state.ranks if rank.path is not None]
    document: dict[str, object] = {"policy": state.settings.policy}
    if len(reports) < len(state.ranks) or not reports:
        return document | {"active": None, "reason": "Unknown", "message": "not decided yet"}
    fallback = next((report for report in reports if not report.direct), None)
    if fallback is None:
        return document | {"active": True, "reason": "", "message": ""}
    reason, message = fallback.direct_reason, fallback.direct_message
    return document | {"active": False, "reason": reason, "message": message}


def _rank(rank: RankState) -> dict[str, object]:
    progress = rank.progress
    return {
        "rank": rank.rank,
        "device": rank.device,
        "resident": rank.offer is not None,
        "totalBytes": rank.total_bytes,
        "readBytes": rank.read_bytes,
        "verifiedBytes": progress.verified if progress else 0,
        "bytesPerSecond": rank.bytes_per_second,
        "gibPerSecond": _gib(rank.bytes_per_second),
        "etaSeconds": _tenths(rank.eta_seconds),
        "gpu": rank.locality.document() if rank.locality else None,
        "path": rank.path.path if rank.path else None,
        "pathReason": rank.path.reason if rank.path else None,
        "times": {
            "workerStarted": rank.worker_started,
            "readBegan": progress.began if progress else None,
            "firstByte": progress.first_byte if progress else None,
            "lastByte": progress.last_byte if progress else None,
            "verified": rank.verified_at,
        },
    }


def _attachment(item: Attachment) -> dict[str, object]:
    peer = item.peer
    return {"rank": peer.rank, "pid": peer.pid, "attached": item.began, "detached": item.ended}


def _tenths(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _gib(rate: float | None) -> float | None:
    return None if rate is None else round(rate / _GIB, 3)
