"""GPU memory: exportable allocations filled from storage and checked on the GPU.

Three ways lead there. GPUDirect Storage moves data from storage to the GPU by DMA; it is taken
when `gds.probe` finds all it needs. Otherwise the data is staged through host memory: by direct
I/O, or from the page cache when the file is there already.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from headrace_checkpoint.manifest import MULTILINEAR64
from headrace_loader.backends import (
    BackendOptions,
    ChunkMismatch,
    PartSource,
    PathPolicy,
    PathReport,
    Progress,
    Region,
)
from headrace_loader.backends.parallel import run_parallel
from headrace_loader.backends.reading import ALIGNMENT, PartFile, staged, threads_for
from headrace_loader.cuda import gds, native
from headrace_loader.cuda.compiled import CompiledLoad
from headrace_loader.cuda.digester import Digester
from headrace_loader.cuda.driver import Allocation, CudaError, Device, HostBuffer
from headrace_loader.cuda.lanes import DirectLane, Lane, pinned_bytes, staged_lanes
from headrace_loader.cuda.opening import opening
from headrace_loader.cuda.runs import Run, cut
from headrace_loader.errors import (
    BackendUnavailable,
    DirectPathUnavailable,
    GpuFailed,
    InternalError,
    OutOfMemory,
    StorageError,
)
from headrace_loader.topology import locality, run_near

_NO_MOVER = "the loader was built without a C compiler, which makes it slower"


class CudaRegion:
    """One allocation of a whole number of 2 MiB pages, mapped read-write in this process."""

    def __init__(self, allocation: Allocation) -> None:
        self._allocation = allocation

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._allocation.size

    @property
    def pointer(self) -> int:
        """Address on the device."""
        return self._allocation.pointer

    def export(self) -> int:
        """Return a new descriptor of the allocation."""
        return self._allocation.export()


class CudaBackend:
    """Memory of one GPU; the process uses no other."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._opening = opening(options.local_rank)
        self._direct = gds.probe(options.policy is not PathPolicy.OFF)
        if options.policy is PathPolicy.REQUIRE and not self._direct.available:
            raise DirectPathUnavailable(f"--path Require: {self._direct.message}")
        self.locality = locality(self._opening.bus_id())
        run_near(self.locality.cpus)  # memory that is touched from here on is near, too
        self._buffers = HostBuffer(pinned_bytes(options.read_threads))

    @cached_property
    def _device(self) -> Device:
        return self._opening.device()

    @cached_property
    def device(self) -> str:
        """GPU-<uuid>."""
        return self._device.uuid

    def allocate(self, nbytes: int) -> CudaRegion:
        """Allocate exportable memory that GPUDirect can reach where the device allows it."""
        try:
            return CudaRegion(self._device.allocate(nbytes))
        except CudaError as error:
            if not error.out_of_memory:
                raise self._failed(error) from None
            raise OutOfMemory(
                f"{self.device}: {nbytes} bytes for one region: "
                f"{self._device.free_bytes()} bytes are free; use more GPUs "
                "(spec.parallelism.tensorParallelSize) or end what else uses this one"
            ) from None

    def _failed(self, error: CudaError) -> GpuFailed:
        return GpuFailed(
            f"{self.device}: {error}: the GPU or its driver failed; look for Xid in the node's "
            "kernel log, and drain the node if it happens again"
        )

    def fill(self, transfers: Sequence[tuple[Region, PartSource]], progress: Progress) -> None:
        """Move all chunks, digests behind them on the GPU, and compare at the end."""
        try:
            self._fill(transfers, progress)
        except CudaError as error:
            if not error.out_of_memory:
                raise self._failed(error) from None
            raise OutOfMemory(
                f"{self.device}: {error}: no memory is left beside the weights, on the GPU or for "
                "pinned buffers; end what else uses this GPU, or raise the container's limit"
            ) from None

    def _fill(self, transfers: Sequence[tuple[Region, PartSource]], progress: Progress) -> None:
        sources = [source for _, source in transfers]
        with ExitStack() as stack:
            files = [stack.enter_context(PartFile(s)) for s in sources]
            expected = _digests(sources)
            pointers = [_pointer(region) for region, _ in transfers]
            direct, report = self._path(files, pointers[0])
            by_run = bool(direct) or native.mover() is None or not _all_buffered(files)
            runs = list(cut(files, pointers, self._options.read_threads if by_run else 1))
            load = None if direct else self._compiled(files, runs, progress)
            if load:
                stack.callback(load.close)
            digester = Digester(len(expected))
            if not direct:
                self._buffers.pin()
            lanes = self._lanes(direct, pointers[0], digester) if by_run else ()
            if load:
                load.ready(digester)
            progress.path(report)
            left = runs if load is None else load.move()
            if left:
                # What is used for practice must be moved later: the rest is verified already.
                lanes = lanes or self._lanes(direct, left[0].pointer, digester)
                run_parallel(left, [self._mover(lane, digester, progress) for lane in lanes])
            found = digester.results([way.stream for way in (load, *lanes) if way])
            if found != expected:
                raise _mismatch(sources, expected, found)
            for source in sources:
                progress.verified(source.nbytes)
        digester.close()

    def _compiled(
        self, files: Sequence[PartFile], runs: list[Run], progress: Progress
    ) -> CompiledLoad | None:
        """Begin the load of what is in the page cache; None where nothing is, or no mover."""
        mover = native.mover()
        if mover is None or not any(file.buffered_reason for file in files):
            return None
        threads = threads_for(files, self._options.read_threads, self._options.cpus)
        return CompiledLoad(mover, self._buffers, threads, runs, progress.read)

    def _mover(self, lane: Lane, digester: Digester, progress: Progress) -> Callable[[Run], None]:
        def move(run: Run) -> None:
            self._device.use()
            lane.move(run, progress.read)
            run.digest(digester, lane.stream)

        return move

    def _path(
        self, files: Sequence[PartFile], pointer: int
    ) -> tuple[dict[Path, gds.DirectFile], PathReport]:
        """Choose how the bytes travel; returns files opened for cuFile, none if not by it.

        Opening them tells whether cuFile takes them. It may take them and refuse to read, so it
        reads the first block of the first one.
        """
        direct = self._direct
        if direct.available:
            try:
                opened = {file.source.path: gds.DirectFile(file.source.path) for file in files}
                first = files[0].source
                opened[first.path].read(pointer, first.offset, min(first.nbytes, ALIGNMENT))
            except (DirectPathUnavailable, StorageError) as error:
                if self._options.policy is PathPolicy.REQUIRE:
                    raise DirectPathUnavailable(f"--path Require: {error}") from None
                refused = isinstance(error, DirectPathUnavailable)
                reason = "FileSystemUnsupported" if refused else "FirstReadFailed"
                direct = gds.Probe(False, reason, str(error))
            else:
                return opened, PathReport("GPUDirect", "", True, "", "")
        report = staged(files, direct.reason, direct.message)
        if report.path != "O_DIRECT" and native.mover() is None:
            report = replace(report, reason="; ".join(filter(None, (report.reason, _NO_MOVER))))
        return {}, report

    def _lanes(
        self, direct: Mapping[Path, gds.DirectFile], pointer: int, digester: Digester
    ) -> Sequence[Lane]:
        """Return ways for threads of Python, ready to be used."""
        if direct:
            return [DirectLane(direct) for _ in range(self._options.read_threads)]
        lanes = staged_lanes(self._buffers)
        for lane in lanes:
            lane.warm(pointer, digester)
        return lanes


def _all_buffered(files: Sequence[PartFile]) -> bool:
    return all(file.buffered_reason for file in files)


def _pointer(region: Region) -> int:
    if not isinstance(region, CudaRegion):
        raise InternalError("a region of another backend was given to the CUDA backend")
    return region.pointer


def _digests(sources: Sequence[PartSource]) -> list[int]:
    """Return the digests of all chunks."""
    for source in sources:
        if source.digest_algorithm != MULTILINEAR64:
            raise BackendUnavailable(
                f"{source.path}: digestAlgorithm {source.digest_algorithm}: the CUDA backend "
                f"checks {MULTILINEAR64} alone; shard the model again"
            )
    return [int(digest, 16) for source in sources for digest in source.digests]


def _mismatch(
    sources: Sequence[PartSource], expected: Sequence[int], found: Sequence[int]
) -> ChunkMismatch:
    chunks = [(source, chunk) for source in sources for chunk in range(len(source.digests))]
    first = next(
        n for n, (want, have) in enumerate(zip(expected, found, strict=True)) if want != have
    )
    return ChunkMismatch(*chunks[first], f"{found[first]:016x}")
