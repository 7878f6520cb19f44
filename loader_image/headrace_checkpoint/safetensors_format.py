"""Reading and writing safetensors headers. Standard library only.

A file is: 8 bytes little-endian length of the header, the header (JSON, may be padded
with spaces), then the data section. Offsets in the header count from the start of the
data section, which tensors must cover without holes or overlaps.

Stricter than the reference library in two points: names must be unique, and element
types narrower than a byte are refused.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace_checkpoint.dtypes import ITEM_BYTES, tensor_bytes
from headrace_checkpoint.errors import SourceCorrupt
from headrace_checkpoint.manifest import MAX_DIMENSIONS, MAX_INTEGER, TensorEntry

MAX_HEADER_BYTES = 100_000_000
"""The reference library's own limit."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `data_offset` is where the data section starts in the file.

    Tensors are in order of their offsets.
    """

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_offset: int


def read_header(read_at: Callable[[int, int], bytes], file_bytes: int) -> Header:
    """Read the header of a file of `file_bytes` bytes through `read_at(offset, length)`.

    Raises SourceCorrupt, whose message does not name the file: the caller knows it.
    """
    if file_bytes < _LENGTH_BYTES:
        raise SourceCorrupt(f"{file_bytes} bytes: too short for a safetensors file; copy it again")
    length = int.from_bytes(read_at(0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise SourceCorrupt(
            f"header length {length}: must be at most {MAX_HEADER_BYTES}; "
            "the file is damaged or no safetensors file"
        )
    data_offset = _LENGTH_BYTES + length
    if data_offset > file_bytes:
        raise SourceCorrupt(
            f"header length {length}: exceeds the {file_bytes} bytes of the file; "
            "it is truncated, copy it again"
        )
    tensors, metadata = parse_header(read_at(_LENGTH_BYTES, length), file_bytes - data_offset)
    return Header(tensors, metadata, data_offset)


def parse_header(
    content: bytes, data_bytes: int
) -> tuple[tuple[TensorEntry, ...], Mapping[str, str]]:
    """Check the JSON of a header against a data section of `data_bytes` bytes.

    Returns the tensors in order of their offsets, and the metadata. Raises SourceCorrupt.
    """
    document = _load(content)
    metadata = _metadata(document.pop(_METADATA, {}))
    tensors = sorted(
        (_tensor(name, value) for name, value in document.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes),
    )
    end = 0
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlap" if tensor.offset < end else "leave a hole before"
            raise SourceCorrupt(
                f"tensor {_short(tensor.name)}: data_offsets start at {tensor.offset}, "
                f"{kind} byte {end}; tensors must lie back to back"
            )
        end += tensor.nbytes
    if end != data_bytes:
        raise SourceCorrupt(
            f"tensors end at byte {end} of the data section, which has {data_bytes} bytes; "
            "the file is truncated or has bytes appended, copy it again"
        )
    return tuple(tensors), metadata


def build_header(
    tensors: Sequence[TensorEntry], *, alignment: int, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return length prefix and header, padded with spaces to a multiple of `alignment` bytes.

    Tensors must lie back to back in the order given.
    """
    document: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    for tensor in tensors:
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.nbytes],
        }
    content = json.dumps(document, separators=(",", ":")).encode()
    total = -(-(_LENGTH_BYTES + len(content)) // alignment) * alignment
    content = content.ljust(total - _LENGTH_BYTES)
    return len(content).to_bytes(_LENGTH_BYTES, "little") + content


def _load(content: bytes) -> dict[str, object]:
    if not content.startswith(b"{"):
        raise SourceCorrupt(f"header starts with {content[:8]!r}: must be a JSON object")
    try:
        document = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise SourceCorrupt(f"header is no JSON object: {_short(error)}") from None
    if not isinstance(document, dict):
        raise SourceCorrupt("header is no JSON object")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise SourceCorrupt(f"{_short(twice)} appears twice in the header")
    return document


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON")


def _metadata(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SourceCorrupt(f"{_METADATA}: {_short(value)}: must map strings to strings")
    return value


def _tensor(name: str, value: object) -> TensorEntry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SourceCorrupt(f"tensor {_short(name)}: the name is not valid Unicode") from None
    if not isinstance(value, dict):
        raise SourceCorrupt(f"tensor {_short(name)}: {_short(value)}: must be an object")
    dtype = value.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise SourceCorrupt(
            f"tensor {_short(name)}: dtype {_short(dtype)}: must be one of {', '.join(ITEM_BYTES)}"
        )
    shape = _naturals(name, "shape", value.get("shape"))
    offsets = _naturals(name, "data_offsets", value.get("data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceCorrupt(
            f"tensor {_short(name)}: data_offsets {_short(list(offsets))}: must be [begin, end]"
        )
    nbytes = offsets[1] - offsets[0]
    if nbytes != tensor_bytes(dtype, shape):
        raise SourceCorrupt(
            f"tensor {_short(name)}: data_offsets {list(offsets)} span {nbytes} bytes: "
            f"{dtype} of shape {_short(list(shape))} needs {_short(tensor_bytes(dtype, shape))}"
        )
    return TensorEntry(name, dtype, shape, offsets[0], nbytes)


def _naturals(name: str, field: str, value: object) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_DIMENSIONS  # beyond it, multiplying alone can take hours
        or not all(type(item) is int and 0 <= item <= MAX_INTEGER for item in value)
    ):
        raise SourceCorrupt(
            f"tensor {_short(name)}: {field} {_short(value)}: must be a list of at most "
            f"{MAX_DIMENSIONS} whole numbers >= 0"
        )
    return tuple(value)


def _short(value: object) -> str:
    """Show a value of untrusted size and content in a message."""
    shown = value.__repr__() if not isinstance(value, Exception) else str(value)
    shown = shown.encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
