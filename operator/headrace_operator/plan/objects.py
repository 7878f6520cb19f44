"""Reading of API objects that may lack any field: wrong types read as absent, nothing raises."""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

Object: TypeAlias = Mapping[str, Any]
"""An API object as the API server sends it."""

# Nearly all are dict; asking the abstract class takes ten times as long.
_MAPPING = (dict, Mapping)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_CAMEL_CASE = re.compile(r"[A-Z][A-Za-z0-9]{0,127}")
MAX_MESSAGE = 1024
"""Characters of a condition's message."""


def at(value: object, *path: str) -> object:
    """Return the value at a path of keys, or None."""
    for key in path:
        if value is None or not isinstance(value, _MAPPING):
            return None
        value = value.get(key)
    return value


def text(value: object, *path: str) -> str:
    """Return the string at a path, or the empty string."""
    found = at(value, *path)
    return found if isinstance(found, str) else ""


def integer(value: object, *path: str) -> int:
    """Return the integer at a path, or 0."""
    found = at(value, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else 0


def items(value: object, *path: str) -> list[Object]:
    """Return the objects of the list at a path."""
    found = at(value, *path)
    return [item for item in found if isinstance(item, _MAPPING)] if isinstance(found, list) else []


def mapping(value: object, *path: str) -> Object:
    """Return the object at a path, or an empty one."""
    found = at(value, *path)
    return found if isinstance(found, _MAPPING) else {}


def name_of(value: object) -> str:
    """Return metadata.name, or the empty string."""
    return text(value, "metadata", "name")


def uid_of(value: object) -> str:
    """Return metadata.uid, or the empty string."""
    return text(value, "metadata", "uid")


def is_deleting(value: object) -> bool:
    """Whether the object waits for its deletion."""
    return bool(text(value, "metadata", "deletionTimestamp"))


def condition_of(value: object, kind: str) -> Object:
    """Return the condition of a type from status.conditions, or an empty one."""
    found = (c for c in items(value, "status", "conditions") if text(c, "type") == kind)
    return next(found, {})


def is_true(value: object, kind: str) -> bool:
    """Whether the condition of a type is there and True."""
    return text(condition_of(value, kind), "status") == "True"


def controller_uid(value: object) -> str:
    """Return the UID of the controlling owner, or the empty string."""
    references = items(value, "metadata", "ownerReferences")
    return next((text(ref, "uid") for ref in references if at(ref, "controller") is True), "")


def camel_case(word: str, otherwise: str) -> str:
    """Return a word that can be a condition's reason, or the other one."""
    return word if _CAMEL_CASE.fullmatch(word) else otherwise


def one_line(message: str) -> str:
    """Return a message of one line and bounded length, fit for a condition."""
    flat = _CONTROL.sub(" ", message).strip()
    return flat if len(flat) <= MAX_MESSAGE else flat[: MAX_MESSAGE - 1] + "…"


def canonical_json(value: object) -> str:
    """Return the JSON text that equal values share."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def parse_time(value: str) -> datetime | None:
    """Parse an RFC 3339 time; None when it is none."""
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def format_time(value: datetime) -> str:
    """Format a time as the API does: RFC 3339 in UTC, whole seconds."""
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age_seconds(value: object, now: datetime) -> float:
    """Return the seconds since an object's creation, 0 when that is unknown."""
    created = parse_time(text(value, "metadata", "creationTimestamp"))
    return max(0.0, (now - created).total_seconds()) if created else 0.0
