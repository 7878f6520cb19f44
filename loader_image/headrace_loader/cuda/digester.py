"""Chunk digests computed on the GPU, where the weights are."""

from importlib import resources

from headrace_loader.cuda.driver import CudaError, Kernel, Stream, Words
from headrace_loader.cuda.runs import WORD

_NAME = "multilinear64"
_BLOCKS_PER_CHUNK, _THREADS = 16, 256


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
        out = self._digests.pointer + index * WORD
        arguments = (pointer, -(-size // WORD), chunk_bytes // WORD, out)
        self._kernel.launch(stream, (_BLOCKS_PER_CHUNK, chunks), _THREADS, arguments)

    def results(self) -> list[str]:
        """Return the digests as 16 hex digits each; the streams must have been synchronized."""
        return [f"{value:016x}" for value in self._digests.take()]


def _kernel() -> Kernel:
    """Take machine code where it fits GPU and driver; compiling the PTX takes 35 ms and more."""
    images = resources.files(__package__)
    try:
        return Kernel(images.joinpath("digest.fatbin").read_bytes(), _NAME)
    except CudaError:
        return Kernel(images.joinpath("digest.ptx").read_bytes() + b"\0", _NAME)
