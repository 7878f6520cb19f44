"""Chunk digests computed on the GPU, where the weights are."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

from headrace_loader.cuda.driver import CudaError, Kernel, Words
from headrace_loader.cuda.runs import WORD
from headrace_loader.errors import BackendUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headrace_loader.cuda.driver import Stream

_NAME = "multilinear64"
BLOCKS_PER_CHUNK, THREADS = 64, 256
"""Of a launch: blocks that share a chunk, and threads of a block."""


class Digester:
    """Digests of `count` chunks, queued in any order by any number of streams."""

    def __init__(self, count: int) -> None:
        self._kernel = _kernel()
        self._digests = Words(count)

    def queue(self, stream: Stream, index: int, pointer: int, size: int, chunk_bytes: int) -> None:
        """Queue the digests of the chunks from `index` on, in `size` bytes at `pointer`.

        All but the last have `chunk_bytes`; the last is padded with zeros to whole words.
        """
        chunks = -(-size // chunk_bytes)
        arguments = (pointer, -(-size // WORD), chunk_bytes // WORD, self.place(index))
        self._kernel.launch(stream, (BLOCKS_PER_CHUNK, chunks), THREADS, arguments)

    def warm(self, stream: Stream, pointer: int) -> None:
        """Queue a launch that adds nothing."""
        self._kernel.launch(
            stream, (BLOCKS_PER_CHUNK, 1), THREADS, (pointer, 0, WORD, self.place(0))
        )

    def place(self, index: int) -> int:
        """Return the device address of the digest of a chunk."""
        return self._digests.pointer + index * WORD

    @property
    def kernel(self) -> int:
        """The function, for compiled code to launch."""
        return self._kernel.handle

    def results(self, streams: Sequence[Stream]) -> list[int]:
        """Return the digests when all work queued in `streams` is done."""
        for stream in streams[1:]:
            stream.synchronize()
        return self._digests.take(streams[0])

    def close(self) -> None:
        """Free the digests' memory, which takes longer than to read them."""
        self._digests.free()


def _kernel() -> Kernel:
    """Take machine code where it fits GPU and driver; compiling the PTX takes 35 ms and more.

    Raises BackendUnavailable where neither fits.
    """
    images = resources.files(__package__)
    try:
        return Kernel(images.joinpath("digest.fatbin").read_bytes(), _NAME)
    except CudaError as error:
        if not error.no_code:
            raise
    try:
        return Kernel(images.joinpath("digest.ptx").read_bytes() + b"\0", _NAME)
    except CudaError as error:
        if not error.no_code:
            raise
        raise BackendUnavailable(
            f"--backend cuda: {error}: the GPU has compute capability below 8.0, or its driver is "
            "older than CUDA 11; use a newer one"
        ) from None
