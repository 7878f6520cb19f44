"""The manifest of a checkpoint: typed reading and writing of manifest.json.

Standard library only, so that the loader and the engine side can import it without
numpy. docs/checkpoint.md specifies the format for other writers and readers.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from headrace_checkpoint.dtypes import ITEM_BYTES, tensor_bytes
from headrace_checkpoint.errors import ManifestInvalid, StorageError
from headrace_checkpoint.files import NotRegularFile, read_regular

FORMAT = "headrace-checkpoint"
FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
DATA_ALIGNMENT = 4096
"""Bytes. The data section of every part starts on a multiple of it (direct I/O)."""
TENSOR_ALIGNMENT = 256
"""Bytes. Tensors whose size is a multiple of it start on a multiple of it."""
CHUNK_BYTES = 4 * 1024 * 1024
"""Bytes of data section that one digest covers, as written; readers take the manifest's."""

MULTILINEAR64 = "multilinear64"
"""The digest of weight data that headrace_checkpoint.digest defines."""

DIGEST_HEX_DIGITS = {"sha256": 64, MULTILINEAR64: 16}
"""Algorithms that chunk digests may have, with the length of their digests."""

MAX_PARTS = 252
"""Parts of a rank that can be handed over: as many descriptors as one message takes."""

MAX_INTEGER = 2**63 - 1
MAX_DIMENSIONS = 64
_MAX_CHUNK_BYTES = 1024**3
_MAX_MANIFEST_BYTES = 256 * 1024 * 1024
_MAX_NAME = 4096
_SELF_DIGEST = "selfDigest"
_NO_DIGEST = "0" * 64
_HEX = re.compile(r"[0-9a-f]+")
_PLAIN_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor; `offset` counts bytes from the start of the part's data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def to_object(self) -> dict[str, object]:
        """Return the JSON object of this tensor."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "offset": self.offset,
            "bytes": self.nbytes,
        }


@dataclass(frozen=True, slots=True)
class Part:
    """One safetensors file of one rank.

    `file_bytes == data_offset + data_bytes`; `chunk_digests` are hex digests by
    `Manifest.digest_algorithm` over consecutive pieces of `Manifest.chunk_bytes` of the
    data section, the last one short.
    """

    rank: int
    part: int
    file: str
    file_bytes: int
    data_offset: int
    data_bytes: int
    chunk_digests: tuple[str, ...]
    tensors: tuple[TensorEntry, ...]

    def names_between(self, begin: int, end: int) -> list[str]:
        """Return the names of the tensors with bytes from `begin` to `end` of the data section."""
        return [
            tensor.name
            for tensor in self.tensors
            if tensor.offset < end and begin < tensor.offset + tensor.nbytes
        ]

    def to_object(self) -> dict[str, object]:
        """Return the JSON object of this part."""
        return {
            "rank": self.rank,
            "part": self.part,
            "file": self.file,
            "bytes": self.file_bytes,
            "dataOffset": self.data_offset,
            "dataBytes": self.data_bytes,
            "chunkDigests": list(self.chunk_digests),
            "tensors": [tensor.to_object() for tensor in self.tensors],
        }


def is_plain_file(name: str) -> bool:
    """Whether a checkpoint can have a file of this name."""
    return _PLAIN_FILE.fullmatch(name) is not None


def rank_file(rank: int, part: int, tensor: int, stages: int) -> str:
    """Return the name of a part file, as vLLM's sharded_state has it by default.

    `rank` counts tensor parallel ranks, `tensor` of them in each of the pipeline `stages`.
    """
    if stages == 1:
        return f"model-rank-{rank}-part-{part}.safetensors"
    return f"model-pp-{rank // tensor}-tp-{rank % tensor}-part-{part}.safetensors"


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file copied unchanged from the source, such as config.json; hex SHA-256 digest."""

    file: str
    nbytes: int
    digest: str

    def to_object(self) -> dict[str, object]:
        """Return the JSON object of this file."""
        return {"file": self.file, "bytes": self.nbytes, "digest": self.digest}


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of the parallel dimensions the checkpoint is cut for."""

    tensor: int
    pipeline: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Number of ranks that have files of their own."""
        return self.tensor * self.pipeline


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a reader needs to know about a checkpoint before it reads weights."""

    layout: str
    identity: Mapping[str, object]
    architecture: str
    parallelism: Parallelism
    chunk_bytes: int
    parts: tuple[Part, ...]
    files: tuple[CopiedFile, ...]
    digest_algorithm: str = "sha256"
    source: tuple[CopiedFile, ...] = ()
    """Fingerprints of the source's files; empty where the writer kept none."""

    @property
    def total_bytes(self) -> int:
        """Bytes of weights over all ranks: the sum of the parts' data sections."""
        return sum(part.data_bytes for part in self.parts)

    def rank_parts(self, rank: int) -> tuple[Part, ...]:
        """Return the parts of one rank in order; empty for a rank that is not in the manifest."""
        return tuple(part for part in self.parts if part.rank == rank)

    def to_json(self) -> bytes:
        """Serialise; the inverse of `from_json`, deterministic for equal manifests."""
        document = {
            "format": FORMAT,
            "formatVersion": FORMAT_VERSION,
            "layout": self.layout,
            "identity": dict(self.identity),
            "architecture": self.architecture,
            "parallelism": {
                "tensor": self.parallelism.tensor,
                "pipeline": self.parallelism.pipeline,
                "expert": self.parallelism.expert,
            },
            "digestAlgorithm": self.digest_algorithm,
            "chunkBytes": self.chunk_bytes,
            "totalBytes": self.total_bytes,
            "parts": [part.to_object() for part in self.parts],
            "files": [file.to_object() for file in self.files],
            "source": [file.to_object() for file in self.source],
            _SELF_DIGEST: _NO_DIGEST,
        }
        content = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        kept, _, end = content.rpartition(_NO_DIGEST.encode())
        return kept + hashlib.sha256(content).hexdigest().encode() + end

    @classmethod
    def from_json(cls, content: bytes) -> "Manifest":
        """Parse and check every rule of the format; raises ManifestInvalid naming the field."""
        root = _Node.parse(content)
        root.field("format").equals(FORMAT)
        root.field("formatVersion").equals(FORMAT_VERSION)
        algorithm = root.field("digestAlgorithm").choice(DIGEST_HEX_DIGITS)
        parallelism = _parallelism(root.field("parallelism"))
        chunk_bytes = root.field("chunkBytes").integer(minimum=DATA_ALIGNMENT)
        if chunk_bytes % DATA_ALIGNMENT or chunk_bytes > _MAX_CHUNK_BYTES:
            raise root.field("chunkBytes").fail(
                f"must be a multiple of {DATA_ALIGNMENT}, at most {_MAX_CHUNK_BYTES}"
            )
        manifest = cls(
            layout=root.field("layout").text(),
            identity=root.field("identity").mapping(),
            architecture=root.field("architecture").text(),
            parallelism=parallelism,
            chunk_bytes=chunk_bytes,
            parts=tuple(
                _part(node, chunk_bytes, DIGEST_HEX_DIGITS[algorithm])
                for node in root.field("parts").items()
            ),
            files=tuple(_file(node) for node in root.field("files").items()),
            digest_algorithm=algorithm,
            source=tuple(_fingerprint(node) for node in root.optional("source").items()),
        )
        root.field("totalBytes").equals(manifest.total_bytes)
        _check_ranks(manifest, root.field("parts"))
        _check_file_names(manifest, root)
        return manifest


def check_self_digest(content: bytes) -> bool:
    """Compare a manifest with the digest it has of itself; False where it has none.

    `content` is one that `Manifest.from_json` accepts. Raises ManifestInvalid.
    """
    node = _Node.parse(content)
    if _SELF_DIGEST not in node.mapping():
        return False
    digest = node.field(_SELF_DIGEST).digest(len(_NO_DIGEST))
    found = hashlib.sha256(content.replace(digest.encode(), _NO_DIGEST.encode())).hexdigest()
    if found != digest:
        raise ManifestInvalid(f"{_SELF_DIGEST}: {digest}: the content has {found}; it is damaged")
    return True


def read_manifest(directory: Path | str) -> Manifest:
    """Read `manifest.json` of a checkpoint directory.

    Raises FileNotFoundError when there is none, ManifestInvalid when it is wrong,
    StorageError when it cannot be read.
    """
    return read_manifest_and_content(directory)[0]


def read_manifest_and_content(directory: Path | str) -> tuple[Manifest, bytes]:
    """Do what `read_manifest` does; return the bytes it was read from as well."""
    path = Path(directory) / FILE_NAME
    try:
        content = read_regular(path, _MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; the directory is no checkpoint") from None
    except NotRegularFile as error:
        raise ManifestInvalid(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise StorageError(f"{path}: reading failed: {error.strerror}") from error
    if len(content) > _MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"{path}: larger than {_MAX_MANIFEST_BYTES} bytes")
    try:
        return Manifest.from_json(content), content
    except ManifestInvalid as error:
        raise ManifestInvalid(f"{path}: {error}") from None


def parts_from_json(content: bytes) -> tuple[Part, ...]:
    """Parse a list of parts as written by this version; raises ManifestInvalid."""
    digits = DIGEST_HEX_DIGITS[MULTILINEAR64]
    return tuple(_part(node, CHUNK_BYTES, digits) for node in _Node.parse(content).items())


def copied_files(value: object) -> tuple[CopiedFile, ...]:
    """The inverse of `CopiedFile.to_object` for a list of them; raises ManifestInvalid."""
    return tuple(_fingerprint(node) for node in _Node(value, "files").items())


class _Node:
    """A JSON value together with its path, for messages that name the field."""

    __slots__ = ("path", "value")

    def __init__(self, value: object, path: str) -> None:
        self.value = value
        self.path = path

    @classmethod
    def parse(cls, content: bytes) -> "_Node":
        try:
            value = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ManifestInvalid(f"not a JSON document: {error!s:.200}") from None
        return cls(value, "")

    def fail(self, rule: str) -> ManifestInvalid:
        shown = repr(self.value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ManifestInvalid(f"{self.path or 'document'}: {shown}: {rule}")

    def field(self, name: str) -> "_Node":
        path = f"{self.path}.{name}" if self.path else name
        value = self.mapping()
        if name not in value:
            raise ManifestInvalid(f"{path}: missing")
        return _Node(value[name], path)

    def optional(self, name: str) -> "_Node":
        """Return a field that may be missing, as an empty list then."""
        value = self.mapping()
        return self.field(name) if name in value else _Node([], name)

    def items(self, maximum: int = MAX_INTEGER) -> list["_Node"]:
        if not isinstance(self.value, list):
            raise self.fail("must be a list")
        if len(self.value) > maximum:
            raise self.fail(f"must have at most {maximum} entries")
        return [_Node(item, f"{self.path}[{index}]") for index, item in enumerate(self.value)]

    def mapping(self) -> dict[str, object]:
        if not isinstance(self.value, dict):
            raise self.fail("must be an object")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            raise self.fail("must be a non-empty string")
        return self.value

    def name(self) -> str:
        text = self.text()
        if len(text) > _MAX_NAME or any("\ud800" <= one <= "\udfff" for one in text):
            raise self.fail(f"must be Unicode of at most {_MAX_NAME} characters")
        return text

    def integer(self, minimum: int = 0) -> int:
        if type(self.value) is not int or not minimum <= self.value <= MAX_INTEGER:
            raise self.fail(f"must be a whole number from {minimum} to {MAX_INTEGER}")
        return self.value

    def choice(self, allowed: Collection[str]) -> str:
        text = self.text()
        if text not in allowed:
            raise self.fail(f"must be one of {', '.join(allowed)}")
        return text

    def digest(self, digits: int) -> str:
        text = self.text()
        if len(text) != digits or not _HEX.fullmatch(text):
            raise self.fail(f"must be {digits} lower-case hexadecimal digits")
        return text

    def file_name(self) -> str:
        text = self.text()
        if not is_plain_file(text):
            raise self.fail("must be a plain file name inside the checkpoint directory")
        return text

    def equals(self, expected: str | int) -> None:
        if type(self.value) is not type(expected) or self.value != expected:
            raise self.fail(f"must be {expected!r}")


def _parallelism(node: _Node) -> Parallelism:
    found = Parallelism(
        tensor=node.field("tensor").integer(minimum=1),
        pipeline=node.field("pipeline").integer(minimum=1),
        expert=node.field("expert").integer(minimum=1),
    )
    if found.expert not in (1, found.tensor):
        raise node.field("expert").fail(f"must be 1 or the tensor parallel size, {found.tensor}")
    return found


def _part(node: _Node, chunk_bytes: int, digest_digits: int) -> Part:
    part = Part(
        rank=node.field("rank").integer(),
        part=node.field("part").integer(),
        file=node.field("file").file_name(),
        file_bytes=node.field("bytes").integer(),
        data_offset=node.field("dataOffset").integer(minimum=DATA_ALIGNMENT),
        data_bytes=node.field("dataBytes").integer(minimum=1),
        chunk_digests=_digests(node.field("chunkDigests"), digest_digits),
        tensors=_tensors(node.field("tensors")),
    )
    if part.data_offset % DATA_ALIGNMENT:
        raise node.field("dataOffset").fail(f"must be a multiple of {DATA_ALIGNMENT}")
    node.field("bytes").equals(part.data_offset + part.data_bytes)
    chunks = -(-part.data_bytes // chunk_bytes)
    if len(part.chunk_digests) != chunks:
        raise ManifestInvalid(
            f"{node.path}.chunkDigests: {len(part.chunk_digests)} digests: "
            f"{part.data_bytes} bytes in chunks of {chunk_bytes} need {chunks}"
        )
    _check_back_to_back(part, node)
    return part


def _check_back_to_back(part: Part, node: _Node) -> None:
    end = 0
    for number, tensor in enumerate(part.tensors):
        if tensor.offset != end:
            node.field("tensors").items()[number].field("offset").equals(end)
        end += tensor.nbytes
    node.field("dataBytes").equals(end)


def _digests(node: _Node, digits: int) -> tuple[str, ...]:
    """Check all at once, and one by one only to name the wrong one: there are many."""
    if isinstance(node.value, list):
        whole = re.compile(f"[0-9a-f]{{{digits}}}").fullmatch
        if all(type(item) is str and whole(item) for item in node.value):
            return tuple(node.value)
    return tuple(item.digest(digits) for item in node.items())


def _tensors(node: _Node) -> tuple[TensorEntry, ...]:
    """Check each without a node per field, and with them only to name what is wrong."""
    values = node.value if isinstance(node.value, list) else []
    entries = [_valid_tensor(value) for value in values]
    if values and None not in entries:
        return tuple(entry for entry in entries if entry)
    return tuple(_tensor(item) for item in node.items())


def _valid_tensor(value: object) -> TensorEntry | None:
    if not isinstance(value, dict):
        return None
    name, dtype, shape = value.get("name"), value.get("dtype"), value.get("shape")
    offset, nbytes = value.get("offset"), value.get("bytes")
    if not (type(name) is type(dtype) is str and type(shape) is list and name):
        return None
    if type(offset) is not int or type(nbytes) is not int or offset < 0:
        return None
    for number in shape:
        if type(number) is not int or not 0 <= number <= MAX_INTEGER:
            return None
    if len(name) > _MAX_NAME or not name.isascii() or len(shape) > MAX_DIMENSIONS:
        return None  # names that are not ASCII take the long way
    if dtype not in ITEM_BYTES or nbytes != tensor_bytes(dtype, shape):
        return None
    return TensorEntry(name, dtype, tuple(shape), offset, nbytes)


def _tensor(node: _Node) -> TensorEntry:
    tensor = TensorEntry(
        name=node.field("name").name(),
        dtype=node.field("dtype").choice(ITEM_BYTES),
        shape=tuple(item.integer() for item in node.field("shape").items(MAX_DIMENSIONS)),
        offset=node.field("offset").integer(),
        nbytes=node.field("bytes").integer(),
    )
    node.field("bytes").equals(tensor_bytes(tensor.dtype, tensor.shape))
    return tensor


def _file(node: _Node) -> CopiedFile:
    return CopiedFile(
        file=node.field("file").file_name(),
        nbytes=node.field("bytes").integer(),
        digest=node.field("digest").digest(DIGEST_HEX_DIGITS["sha256"]),
    )


def _fingerprint(node: _Node) -> CopiedFile:
    return CopiedFile(
        file=node.field("file").text(),
        nbytes=node.field("bytes").integer(),
        digest=node.field("digest").digest(DIGEST_HEX_DIGITS["sha256"]),
    )


def _check_ranks(manifest: Manifest, node: _Node) -> None:
    """Each rank has parts 0..n in order, ranks ascend without a hole, names are unique per rank.

    The ranks of a pipeline stage have the same tensors in the same places.
    """
    if manifest.parallelism.ranks > len(manifest.parts):
        raise ManifestInvalid(
            f"{node.path}: {len(manifest.parts)} parts: "
            f"{manifest.parallelism.ranks} ranks need at least one each"
        )
    counts = Counter(part.rank for part in manifest.parts)
    ranks = range(manifest.parallelism.ranks)
    expected = [(rank, part) for rank in ranks for part in range(max(1, counts[rank]))]
    found = [(part.rank, part.part) for part in manifest.parts]
    if found != expected:
        raise ManifestInvalid(
            f"{node.path}: (rank, part) pairs are {_shorten(found)}: "
            f"must be {_shorten(expected)}, every rank with its parts in order"
        )
    of_stage: dict[int, list[tuple[TensorEntry, ...]]] = {}
    for rank, parts in groupby(manifest.parts, lambda part: part.rank):
        tensors = [part.tensors for part in parts]
        twice = _twice(tensor.name for part in tensors for tensor in part)
        if twice is not None:
            raise ManifestInvalid(f"{node.path}: rank {rank} holds tensor {twice!r:.200} twice")
        stage, first = divmod(rank, manifest.parallelism.tensor)
        if tensors != of_stage.setdefault(stage, tensors):
            raise ManifestInvalid(
                f"{node.path}: rank {rank} has other tensors than rank {rank - first}"
            )


def _check_file_names(manifest: Manifest, root: _Node) -> None:
    names = [part.file for part in manifest.parts] + [file.file for file in manifest.files]
    twice = _twice([*names, FILE_NAME])
    if twice is not None:
        raise ManifestInvalid(f"{root.path or 'document'}: file {twice!r} is named twice")


def _twice(names: Iterable[str]) -> str | None:
    """Return a name that is there more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _shorten(pairs: list[tuple[int, int]]) -> str:
    shown = ", ".join(f"{rank}/{part}" for rank, part in pairs[:8])
    return shown + (", ..." if len(pairs) > 8 else "")
