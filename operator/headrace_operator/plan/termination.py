"""The JSON object that sharder and loader leave as their termination message."""

import json
from dataclasses import dataclass

from headrace_operator.plan.objects import Object, camel_case, integer, one_line, text

_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Termination:
    """Why a container of ours ended."""

    reason: str
    message: str
    total_bytes: int | None = None


def termination_of(state: Object) -> Termination | None:
    """Read the termination message of a terminated container state; None if it has none of ours."""
    raw = text(state, "message")
    if not raw or len(raw) > _MAX_BYTES:
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    reason = camel_case(text(value, "reason"), "")
    if not reason:
        return None
    total = integer(value, "totalBytes")
    return Termination(reason, one_line(text(value, "message")), total if total > 0 else None)
