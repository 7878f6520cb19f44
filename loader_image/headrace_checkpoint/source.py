"""The source model: config.json and safetensors files of one place."""

import hashlib
import json
import math
from contextlib import closing
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Self

import numpy as np

from headrace_checkpoint.config import ModelConfig
from headrace_checkpoint.convert import STORAGE, Array
from headrace_checkpoint.dtypes import ITEM_BYTES, tensor_bytes
from headrace_checkpoint.errors import (
    ConfigInvalid,
    SourceCorrupt,
    SourceNotFound,
    TensorMissing,
)
from headrace_checkpoint.manifest import CopiedFile, is_plain_file
from headrace_checkpoint.places import OpenFile, Place
from headrace_checkpoint.plan import SourceTensor
from headrace_checkpoint.report import log
from headrace_checkpoint.safetensors_format import read_header
from headrace_checkpoint.storage import AlignedBuffer

INDEX = "model.safetensors.index.json"
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens*",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_SAMPLED_TENSORS = 1024  # of a file
_SAMPLE_BYTES = 64
_MAX_SMALL_FILE = 256 * 1024 * 1024


class Source:
    """An opened source model; holds a descriptor per weight file until closed.

    `tensors` is the union of all files' headers, by name; `files_to_copy` names the configuration
    and tokenizer files, which engines want beside the weights.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._names = place.names()
        self.files_to_copy = self._files_to_copy()
        if "config.json" not in self._names:
            raise ConfigInvalid(
                f"{place}/config.json: missing; the source must be a model directory"
            )
        self.config = ModelConfig.from_json(self.read_small_file("config.json"))
        self.tensors: dict[str, SourceTensor] = {}
        self._files: dict[str, OpenFile] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def open_weights(self) -> None:
        """Open all weight files and check their headers, and the index where there is one."""
        index = self._index()
        names = sorted(set(index.values())) if index else self._weight_files()
        for name in names:
            self._open(name)
        for tensor, name in index.items():
            found = self.tensors.get(tensor)
            if found is None or found.file != name:
                raise TensorMissing(
                    f"{INDEX}: tensor {tensor!r}: not in {name}, where the index places it; "
                    "copy both again"
                )

    def read(
        self, name: str, rows: tuple[int, int], buffer: AlignedBuffer, row_axes: int = 1
    ) -> Array:
        """Read whole rows, a half-open range, as a matrix of the tensor's storage type.

        It lies in `buffer`.
        """
        tensor = self.tensors[name]
        dtype, width = STORAGE[tensor.dtype], self.row_bytes(name, row_axes)
        offset, length = tensor.offset + rows[0] * width, (rows[1] - rows[0]) * width
        data = self._files[tensor.file].read_aligned(offset, length, buffer)
        return np.frombuffer(data, dtype).reshape(rows[1] - rows[0], -1)

    def row_bytes(self, name: str, row_axes: int = 1) -> int:
        """Bytes of one row of a tensor seen as a matrix, as in Slice."""
        tensor = self.tensors[name]
        return math.prod(tensor.shape[row_axes:]) * ITEM_BYTES[tensor.dtype]

    def check_unchanged(self) -> None:
        """Raise StorageError where a weight file was written since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def fingerprints(self) -> tuple[CopiedFile, ...]:
        """What tells this model from another one in the same place, by file.

        The digest is of a copied file's content; of a weight file's version, where its place has
        one, as S3 has ETags; else of its header and of some bytes in the middle of every tensor.
        """
        copied = (self._content_print(name) for name in self.files_to_copy)
        return (*copied, *(self._weights_print(name) for name in sorted(self._files)))

    def _content_print(self, name: str) -> CopiedFile:
        content = self.read_small_file(name)
        return CopiedFile(name, len(content), hashlib.sha256(content).hexdigest())

    def _weights_print(self, name: str) -> CopiedFile:
        file, found = self._files[name], hashlib.sha256()
        if file.version:
            found.update(file.version.encode())
        else:
            length = int.from_bytes(file.read_at(0, 8), "little")
            found.update(file.read_at(0, 8 + length))
            buffer = AlignedBuffer()
            tensors = [tensor for tensor in self.tensors.values() if tensor.file == name]
            for tensor in tensors[:: -(-len(tensors) // _SAMPLED_TENSORS) or 1]:
                nbytes = tensor_bytes(tensor.dtype, tensor.shape)
                begin = max(0, nbytes // 2 - _SAMPLE_BYTES)
                length = min(_SAMPLE_BYTES, nbytes)
                found.update(file.read_aligned(tensor.offset + begin, length, buffer))
        return CopiedFile(name, file.size, found.hexdigest())

    def _files_to_copy(self) -> list[str]:
        found = [n for n in self._names if any(fnmatchcase(n, pattern) for pattern in _COPIED)]
        left_out = [name for name in found if not is_plain_file(name)]
        if left_out:
            log("files-left-out", "warning", files=left_out, reason="no plain file names")
        return [name for name in found if name not in left_out]

    def read_small_file(self, name: str) -> bytes:
        """Read a whole configuration file; raises SourceNotFound, SourceCorrupt, StorageError."""
        with closing(self._place.open(name)) as file:
            if file.size > _MAX_SMALL_FILE:
                raise SourceCorrupt(
                    f"{self._place}/{name}: {file.size} bytes: at most {_MAX_SMALL_FILE} expected"
                )
            return file.read_at(0, file.size)

    def _index(self) -> dict[str, str]:
        """Tensor names to file names; empty where the model has no index."""
        path = f"{self._place}/{INDEX}"
        if INDEX not in self._names:
            return {}
        try:
            document = json.loads(self.read_small_file(INDEX).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SourceCorrupt(f"{path}: no JSON document: {error}") from None
        index = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(index, dict) or not index:
            raise SourceCorrupt(f"{path}: weight_map: must map tensor names to file names")
        for tensor, name in index.items():
            if not isinstance(name, str) or "/" in name or not name.isprintable():
                raise SourceCorrupt(
                    f"{path}: weight_map: {tensor!r}: {name!r}: must be the plain name of a file "
                    "beside the index"
                )
        return index

    def _weight_files(self) -> list[str]:
        names = [name for name in self._names if fnmatchcase(name, "*.safetensors")]
        if not names:
            raise SourceNotFound(
                f"{self._place}: no *.safetensors files; convert the model to safetensors"
            )
        return names

    def _open(self, name: str) -> None:
        path = f"{self._place}/{name}"
        file = self._files[name] = self._place.open(name)
        try:
            header = read_header(file.read_at, file.size)
        except SourceCorrupt as error:
            raise SourceCorrupt(f"{path}: {error}") from None
        file.allow_direct()
        for entry in header.tensors:
            other = self.tensors.get(entry.name)
            if other is not None:
                raise SourceCorrupt(
                    f"{path}: tensor {entry.name!r}: also in {other.file}; remove one of them"
                )
            offset = header.data_offset + entry.offset
            self.tensors[entry.name] = SourceTensor(
                entry.name, entry.dtype, entry.shape, name, offset
            )
