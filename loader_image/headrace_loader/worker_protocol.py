"""What a worker is told and what it answers.

It is told which parts to load, as JSON on its standard input, which then ends. It answers with
lines of JSON on a socket, the last with the regions' descriptors.

Both ends are the same version of the same program, so decoding checks shape, not rules.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace_loader.backends import PartSource, PathReport
from headrace_loader.errors import InternalError
from headrace_loader.topology import Locality

MAX_LINE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PathChosen:
    """The device is open and the way of the bytes is known; `locality` is a GPU's."""

    device: str
    report: PathReport
    locality: Locality | None = None


@dataclass(frozen=True, slots=True)
class Progressed:
    """Bytes so far; Unix times of the begin of reading, its first and its latest byte."""

    read: int
    verified: int
    began: float
    first_byte: float | None
    last_byte: float | None


@dataclass(frozen=True, slots=True)
class Filled:
    """Everything is resident and verified; one descriptor per part comes along."""

    region_bytes: tuple[int, ...]
    verified_at: float


@dataclass(frozen=True, slots=True)
class Mismatched:
    """A chunk of a part, both by their numbers, has a digest that the manifest does not know."""

    part: int
    chunk: int
    found: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The load failed; `reason` names a class of headrace_loader.errors."""

    reason: str
    message: str


Message = PathChosen | Progressed | Filled | Mismatched | Failed

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (PathChosen, Progressed, Filled, Mismatched, Failed)
}


def encode_plan(sources: Sequence[PartSource]) -> bytes:
    """Return what to write to a worker's standard input."""
    return json.dumps([asdict(source) for source in sources], default=str).encode()


def decode_plan(content: bytes) -> list[PartSource]:
    """Parse it; raises InternalError."""
    try:
        return [
            PartSource(**item | {"path": Path(item["path"]), "digests": tuple(item["digests"])})
            for item in json.loads(content)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InternalError(f"the supervisor sent {content[:80]!r}: {error}") from None


def encode(message: Message) -> bytes:
    """Return the line to send."""
    content = {"kind": type(message).__name__, **asdict(message)}
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Parse a line; raises InternalError."""
    try:
        content = json.loads(line)
        kind = _KINDS[content.pop("kind")]
        if kind is PathChosen:
            content["report"] = PathReport(**content["report"])
            if found := content["locality"]:
                content["locality"] = Locality(**found | {"nics": tuple(found["nics"])})
        if kind is Filled:
            content["region_bytes"] = tuple(content["region_bytes"])
        return kind(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InternalError(f"a worker sent {line[:80]!r}: {error}") from None
