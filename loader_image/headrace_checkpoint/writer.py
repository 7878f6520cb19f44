"""Writes one part file: sequential data, digested chunk by chunk while it goes out."""

from collections import deque
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from headrace_checkpoint.convert import Array
from headrace_checkpoint.digest import digester
from headrace_checkpoint.errors import InternalError
from headrace_checkpoint.manifest import CHUNK_BYTES, DATA_ALIGNMENT, Part
from headrace_checkpoint.plan import PartPlan
from headrace_checkpoint.safetensors_format import build_header
from headrace_checkpoint.storage import (
    AlignedBuffer,
    close,
    create_file,
    set_direct,
    sync,
    write_at,
)

_CHUNKS_IN_FLIGHT = 2


class PartWriter:
    """Appends the data of one part of one rank; `finish` and `sync` make it durable.

    Chunks are digested and written by `executor` while the next one fills; each writer
    holds at most _CHUNKS_IN_FLIGHT + 1 chunks in memory.
    """

    def __init__(
        self, path: Path, rank: int, number: int, plan: PartPlan, algorithm: str, executor: Executor
    ) -> None:
        self._path = path
        self._rank = rank
        self._number = number
        self._plan = plan
        self._digest = digester(algorithm, CHUNK_BYTES)
        self._executor = executor
        self._header = build_header(plan.entries, alignment=DATA_ALIGNMENT)
        self._buffer = AlignedBuffer().view(CHUNK_BYTES)
        self._filled = 0
        self._written = 0
        self._in_flight: deque[Future[tuple[str, memoryview]]] = deque()
        self._digests: list[str] = []
        self._fd = create_file(path)
        write_at(self._fd, path, 0, self._header)
        set_direct(self._fd, path, True)

    def append(self, array: Array) -> None:
        """Write the elements of `array` in row-major order."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        while len(data):
            count = min(len(data), CHUNK_BYTES - self._filled)
            np.frombuffer(self._buffer, np.uint8)[self._filled :][:count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == CHUNK_BYTES:
                self._submit()

    def finish(self) -> Part:
        """Write what is left and return the file's manifest entry; `sync` has to follow."""
        if self._filled:
            self._submit()
        while self._in_flight:
            self._collect()
        if self._written != self._plan.data_bytes:
            raise InternalError(
                f"{self._path}: {self._written} bytes written, {self._plan.data_bytes} planned"
            )
        return Part(
            rank=self._rank,
            part=self._number,
            file=self._path.name,
            file_bytes=len(self._header) + self._written,
            data_offset=len(self._header),
            data_bytes=self._written,
            chunk_digests=tuple(self._digests),
            tensors=self._plan.entries,
        )

    def sync(self) -> None:
        """Make the file durable."""
        sync(self._fd, self._path)

    def close(self) -> None:
        """Wait for chunks under way and close the file; safe after a failure."""
        for future in self._in_flight:
            future.cancel()
        for future in self._in_flight:
            if not future.cancelled():
                future.exception()
        close(self._fd, self._path)

    def _submit(self) -> None:
        offset = len(self._header) + self._written
        self._in_flight.append(
            self._executor.submit(self._store, self._buffer, self._filled, offset)
        )
        self._written += self._filled
        self._filled = 0
        if len(self._in_flight) > _CHUNKS_IN_FLIGHT:
            self._buffer = self._collect()
        else:
            self._buffer = AlignedBuffer().view(CHUNK_BYTES)

    def _collect(self) -> memoryview:
        digest, buffer = self._in_flight.popleft().result()
        self._digests.append(digest)
        return buffer

    def _store(self, buffer: memoryview, length: int, offset: int) -> tuple[str, memoryview]:
        chunk = buffer[:length]
        write_at(self._fd, self._path, offset, chunk)
        return self._digest(chunk), buffer
