"""The messages of handover protocol 1: typed, bounded, checked on decoding.

One message is one line of JSON. docs/handover-protocol.md specifies them for other
implementations.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from headrace_handover.errors import ProtocolViolation

VERSION = 1
MAX_REQUEST_BYTES = 4096
"""Longest line a client may send, line feed included."""
MAX_REPLY_BYTES = 64 * 1024 * 1024
"""Longest line a server may send, line feed included."""
MAX_REGIONS = 252
"""Linux passes at most 253 descriptors in one message; one of them is the lease."""

_MAX_INTEGER = 2**63 - 1
_MAX_RANK = 2**16 - 1
_MAX_TEXT = 4096
_MAX_DTYPE = 32
_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks for: the weights of one rank on one device.

    `device` is "host" or "GPU-<uuid>", the name of the device in nvidia-smi.
    """

    rank: int
    device: str

    def encode(self) -> bytes:
        """Return the line to send."""
        return _line({"version": VERSION, "rank": self.rank, "device": self.device})

    @classmethod
    def decode(cls, line: bytes) -> "Request":
        """Parse a line; raises ProtocolViolation naming the field."""
        root = _Node.parse(line)
        version = root.field("version").integer()
        if version != VERSION:
            raise ProtocolViolation(f"version: {version}: this side speaks {VERSION}")
        return cls(
            rank=root.field("rank").integer(maximum=_MAX_RANK),
            device=root.field("device").text(maximum=256),
        )


@dataclass(frozen=True, slots=True)
class Loading:
    """The weights are not there yet; `note` says why where loading has not begun."""

    loaded_bytes: int
    total_bytes: int
    note: str = ""

    def encode(self) -> bytes:
        """Return the line to send."""
        content = {"loadedBytes": self.loaded_bytes, "totalBytes": self.total_bytes}
        return _line({"status": "loading", **content, "note": self.note})


class Tensor(NamedTuple):
    """A dense tensor; `offset` counts bytes from the start of its region.

    `dtype` is the name safetensors gives it, such as BF16. Whether `nbytes` fits dtype and
    shape is for the reader to check, who knows the element types.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors that differ in name and offset alone; there may be tens of thousands."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    names: list[str]
    offsets: list[int]


def grouped(tensors: Iterable[Tensor]) -> tuple[TensorGroup, ...]:
    """Return tensors as groups, in the order of each group's first."""
    groups: dict[tuple[object, ...], TensorGroup] = {}
    for name, dtype, shape, offset, nbytes in tensors:
        kind = (dtype, shape, nbytes)
        if kind not in groups:
            groups[kind] = TensorGroup(dtype, shape, nbytes, [], [])
        groups[kind].names.append(name)
        groups[kind].offsets.append(offset)
    return tuple(groups.values())


@dataclass(frozen=True, slots=True)
class Region:
    """One allocation: the data section of one part, at its beginning.

    `nbytes` is the size of the allocation, at least `data_bytes`.
    """

    part: int
    nbytes: int
    data_bytes: int
    groups: tuple[TensorGroup, ...]

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors, group by group."""
        for group in self.groups:
            for name, offset in zip(group.names, group.offsets, strict=True):
                yield Tensor(name, group.dtype, group.shape, offset, group.nbytes)


@dataclass(frozen=True, slots=True)
class Ready:
    """The weights, accompanied by one descriptor per region in order, then the lease's.

    `checkpoint` is the hex SHA-256 of the checkpoint's manifest.json.
    """

    rank: int
    checkpoint: str
    regions: tuple[Region, ...]

    @property
    def descriptors(self) -> int:
        """Number of descriptors that accompany the message."""
        return len(self.regions) + 1

    def encode(self) -> bytes:
        """Return the line to send; raises ValueError beyond the protocol's bounds."""
        if len(self.regions) > MAX_REGIONS:
            raise ValueError(f"{len(self.regions)} regions: at most {MAX_REGIONS} can be passed")
        line = _line(
            {
                "status": "ready",
                "rank": self.rank,
                "checkpoint": self.checkpoint,
                "parts": [_part_object(region) for region in self.regions],
                "regions": [{"part": item.part, "bytes": item.nbytes} for item in self.regions],
                "leaseFd": True,
            }
        )
        if len(line) > MAX_REPLY_BYTES:
            raise ValueError(f"the reply has {len(line)} bytes: at most {MAX_REPLY_BYTES}")
        return line


@dataclass(frozen=True, slots=True)
class Failure:
    """The server will not hand over; it closes the connection after this."""

    reason: str
    message: str

    def encode(self) -> bytes:
        """Return the line to send; texts are cut to the protocol's bound."""
        texts = {"reason": self.reason[:64], "message": self.message[:_MAX_TEXT]}
        return _line({"status": "error", **texts})


Reply = Loading | Ready | Failure


def decode_reply(line: bytes) -> Reply:
    """Parse a server's line; raises ProtocolViolation naming the field."""
    root = _Node.parse(line)
    status = root.field("status").text(maximum=16)
    if status == "loading":
        return Loading(
            loaded_bytes=root.field("loadedBytes").integer(),
            total_bytes=root.field("totalBytes").integer(),
            note=root.field("note").text(minimum=0) if root.has("note") else "",
        )
    if status == "ready":
        return _ready(root)
    if status == "error":
        return Failure(
            reason=root.field("reason").text(maximum=64), message=root.field("message").text()
        )
    raise root.field("status").violation("must be loading, ready or error")


def _part_object(region: Region) -> dict[str, object]:
    tensors = [
        {
            "dtype": group.dtype,
            "shape": list(group.shape),
            "bytes": group.nbytes,
            "names": group.names,
            "offsets": group.offsets,
        }
        for group in region.groups
    ]
    return {"part": region.part, "dataBytes": region.data_bytes, "tensors": tensors}


def _ready(root: "_Node") -> Ready:
    if root.field("leaseFd").value is not True:
        raise root.field("leaseFd").violation("must be true in version 1")
    parts, regions = root.field("parts").items(), root.field("regions").items()
    if len(parts) != len(regions) or not 1 <= len(parts) <= MAX_REGIONS:
        raise ProtocolViolation(
            f"parts, regions: {len(parts)} and {len(regions)} entries: "
            f"must be equally many, from 1 to {MAX_REGIONS}"
        )
    ready = Ready(
        rank=root.field("rank").integer(maximum=_MAX_RANK),
        checkpoint=root.field("checkpoint").text(maximum=128),
        regions=tuple(map(_region, parts, regions)),
    )
    _check_unique("regions", "part", [region.part for region in ready.regions])
    names = [name for region in ready.regions for group in region.groups for name in group.names]
    _check_unique("parts", "tensor", names)
    return ready


def _region(part: "_Node", region: "_Node") -> Region:
    number = region.field("part").integer()
    if part.field("part").integer() != number:
        raise part.field("part").violation(f"must be {number}, as in {region.path}")
    nbytes = region.field("bytes").integer(minimum=1)
    data_bytes = part.field("dataBytes").integer(minimum=1, maximum=nbytes)
    groups = tuple(_group(node, data_bytes) for node in part.field("tensors").items())
    return Region(number, nbytes, data_bytes, groups)


def _group(node: "_Node", data_bytes: int) -> TensorGroup:
    """Check names and offsets as a whole; one by one, ten times as slow, where that fails."""
    names, offsets = node.field("names"), node.field("offsets")
    group = TensorGroup(
        dtype=node.field("dtype").text(maximum=_MAX_DTYPE),
        shape=tuple(item.integer() for item in node.field("shape").items(_MAX_DIMENSIONS)),
        nbytes=node.field("bytes").integer(maximum=data_bytes),
        names=names.values(),
        offsets=offsets.values(),
    )
    if len(group.names) != len(group.offsets):
        raise ProtocolViolation(
            f"{node.path}: {len(group.names)} names, {len(group.offsets)} offsets: "
            "must be equally many"
        )
    last = data_bytes - group.nbytes
    if group.names and not _are_valid(group.names, group.offsets, last):
        for name, offset in zip(names.items(), offsets.items(), strict=True):
            name.text()
            offset.integer(maximum=last)
    return group


def _are_valid(names: list[Any], offsets: list[Any], last: int) -> bool:
    """Whether all are what is accepted one by one; False also where that has to be tried."""
    if {*map(type, names)} != {str} or {*map(type, offsets)} != {int}:
        return False
    lengths = {*map(len, names)}
    return (
        0 < min(lengths) <= max(lengths) <= _MAX_TEXT
        and "".join(names).isascii()
        and 0 <= min(offsets) <= max(offsets) <= last
    )


def _check_unique(path: str, what: str, values: Sequence[object]) -> None:
    if len(set(values)) == len(values):
        return
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ProtocolViolation(f"{path}: {what} {value!r:.200} appears twice")
        seen.add(value)


def _line(content: dict[str, object]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


class _Node:
    """A JSON value that knows where it stands, for messages that name the field."""

    __slots__ = ("_key", "_parent", "value")

    def __init__(self, value: object, key: str | int = "", parent: "_Node | None" = None) -> None:
        self.value = value
        self._key = key
        self._parent = parent

    @property
    def path(self) -> str:
        """Made only when asked for: a reply has thousands of values, and none is wrong."""
        above = self._parent.path if self._parent else ""
        if isinstance(self._key, int):
            return f"{above}[{self._key}]"
        return f"{above}.{self._key}" if above else self._key

    @classmethod
    def parse(cls, line: bytes) -> "_Node":
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise ProtocolViolation(f"not a line of JSON: {error!s:.200}") from None
        return cls(value)

    def violation(self, rule: str) -> ProtocolViolation:
        return ProtocolViolation(f"{self.path or 'message'}: {self.value!r:.80}: {rule}")

    def _mapping(self) -> dict[str, object]:
        if not isinstance(self.value, dict):
            raise self.violation("must be an object")
        return self.value

    def has(self, name: str) -> bool:
        return name in self._mapping()

    def field(self, name: str) -> "_Node":
        value = self._mapping()
        if name not in value:
            raise ProtocolViolation(f"{_Node(None, name, self).path}: missing")
        return _Node(value[name], name, self)

    def values(self, maximum: int = _MAX_INTEGER) -> list[Any]:
        if not isinstance(self.value, list) or len(self.value) > maximum:
            raise self.violation("must be a list of bounded length")
        return self.value

    def items(self, maximum: int = _MAX_INTEGER) -> list["_Node"]:
        return [_Node(item, index, self) for index, item in enumerate(self.values(maximum))]

    def integer(self, minimum: int = 0, maximum: int = _MAX_INTEGER) -> int:
        if type(self.value) is not int or not minimum <= self.value <= maximum:
            raise self.violation(f"must be a whole number from {minimum} to {maximum}")
        return self.value

    def text(self, minimum: int = 1, maximum: int = _MAX_TEXT) -> str:
        if not isinstance(self.value, str) or not minimum <= len(self.value) <= maximum:
            raise self.violation(f"must be a string of {minimum} to {maximum} characters")
        if not self.value.isascii() and any("\ud800" <= one <= "\udfff" for one in self.value):
            raise self.violation("must be Unicode without lone surrogates")
        return self.value
