"""Makes a checkpoint from a source model: plan, write, digest, publish."""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, groupby, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headrace_checkpoint import digest
from headrace_checkpoint.convert import STORAGE, Array, convert
from headrace_checkpoint.errors import CheckpointConflict, ConfigInvalid
from headrace_checkpoint.layouts import LAYOUTS
from headrace_checkpoint.manifest import (
    CHUNK_BYTES,
    FILE_NAME,
    CopiedFile,
    Manifest,
    Parallelism,
    Part,
)
from headrace_checkpoint.places import find_place
from headrace_checkpoint.planner import (
    DEFAULT_PART_BYTES,
    Fill,
    PartPlan,
    Plan,
    Segment,
    Slice,
    plan,
    resolve_dtype,
)
from headrace_checkpoint.publish import Workspace, collect_leftovers, find_published
from headrace_checkpoint.report import log
from headrace_checkpoint.source import Source
from headrace_checkpoint.storage import AlignedBuffer, check_free_space, write_file
from headrace_checkpoint.striping import check_striping, set_striping
from headrace_checkpoint.writer import PartWriter

BLOCK_BYTES = 8 * 1024 * 1024
"""Source bytes read at a time; with the writers' chunks this bounds memory."""

_BLOCKS_AHEAD = 4
_THREADS = 8  # they mostly wait for the disk, which needs several transfers under way
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """What to make; `identity` is stored in the manifest and tells checkpoints apart.

    `source` is a directory, s3://BUCKET/PREFIX or hf://OWNER/NAME, of which `revision` is a branch,
    tag or commit. `dtype` is auto, bfloat16, float16 or float32.
    """

    source: Path | str
    output: Path
    tensor_parallel_size: int
    identity: Mapping[str, object]
    dtype: str = "auto"
    layout: str = "vllm"
    part_bytes: int = DEFAULT_PART_BYTES
    revision: str = "main"


@dataclass(frozen=True)
class ShardResult:
    """How it ended: `reason` is Published or AlreadyPublished."""

    reason: str
    manifest: Manifest


def shard(request: ShardRequest) -> ShardResult:
    """Write and publish the checkpoint, unless it is there already.

    Raises the errors of headrace_checkpoint.errors; whatever is raised, nothing but a
    whole checkpoint is ever visible at `request.output`.
    """
    collect_leftovers(request.output)
    manifest = find_published(request.output, request.identity)
    if manifest is not None:
        return ShardResult("AlreadyPublished", manifest)
    with Source(find_place(str(request.source), request.revision)) as source:
        checkpoint_plan = _plan(request, source)
        with Workspace(request.output) as workspace:
            check_free_space(workspace.path, checkpoint_plan.total_bytes)
            part_bytes = max(part.data_bytes for part in checkpoint_plan.parts)
            stripes = set_striping(workspace.path, part_bytes)
            manifest = _write(request, source, checkpoint_plan, workspace.path)
            if stripes:
                check_striping(workspace.path, [part.file for part in manifest.parts], stripes)
            source.check_unchanged()
            published = workspace.publish()
    if published:
        return ShardResult("Published", manifest)
    manifest = find_published(request.output, request.identity)
    if manifest is None:
        raise CheckpointConflict(f"{request.output}: appeared and vanished while it was published")
    return ShardResult("AlreadyPublished", manifest)


def _plan(request: ShardRequest, source: Source) -> Plan:
    architecture = source.config.architecture(LAYOUTS[request.layout])
    source.open_weights()
    dtype = resolve_dtype(request.dtype, source.config, source.tensors)
    checkpoint_plan = plan(
        architecture,
        source.config,
        source.tensors,
        tensor_parallel_size=request.tensor_parallel_size,
        dtype=dtype,
        part_bytes=request.part_bytes,
    )
    for copy, original in checkpoint_plan.equal:
        _check_equal(source, copy, original)
    log(
        "planned",
        architecture=architecture.name,
        dtype=dtype,
        tensorParallelSize=request.tensor_parallel_size,
        totalBytes=checkpoint_plan.total_bytes,
        parts=len(checkpoint_plan.parts),
        ignoredTensors=list(checkpoint_plan.ignored),
    )
    return checkpoint_plan


def _check_equal(source: Source, copy: str, original: str) -> None:
    """Raise ConfigInvalid where a tensor stored twice differs from its original."""
    first, second = source.tensors[copy], source.tensors[original]
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    if same:
        one, other = AlignedBuffer(), AlignedBuffer()
        same = all(
            np.array_equal(source.read(copy, rows, one), source.read(original, rows, other))
            for rows in _row_blocks((0, first.shape[0]), source.row_bytes(copy))
        )
    if not same:
        raise ConfigInvalid(
            f"config.json: tie_word_embeddings: true, but {copy!r} differs from {original!r}; "
            "set it to false, or remove the tensor"
        )


def _write(request: ShardRequest, source: Source, checkpoint_plan: Plan, path: Path) -> Manifest:
    files = tuple(_copy(source, name, path) for name in source.files_to_copy())
    parts: list[Part] = []
    progress = _Progress(checkpoint_plan.total_bytes)
    with ThreadPoolExecutor(_THREADS) as executor:
        for number, part_plan in enumerate(checkpoint_plan.parts):
            parts += _write_part(source, part_plan, number, path, executor, progress)
            log("part-written", part=number, **progress.fields())
    manifest = Manifest(
        layout=request.layout,
        identity=dict(request.identity),
        architecture=checkpoint_plan.architecture,
        parallelism=Parallelism(tensor=request.tensor_parallel_size),
        chunk_bytes=CHUNK_BYTES,
        parts=tuple(sorted(parts, key=lambda part: (part.rank, part.part))),
        files=files,
        digest_algorithm=digest.ALGORITHM,
    )
    write_file(path / FILE_NAME, manifest.to_json())
    return manifest


def _copy(source: Source, name: str, directory: Path) -> CopiedFile:
    content = source.read_small_file(name)
    write_file(directory / name, content)
    return CopiedFile(name, len(content), hashlib.sha256(content).hexdigest())


def _write_part(
    source: Source,
    part_plan: PartPlan,
    number: int,
    directory: Path,
    executor: Executor,
    progress: "_Progress",
) -> list[Part]:
    """Write one part of all ranks side by side, so that each source block is read once."""
    ranks = range(len(part_plan.tensors[0].by_rank))
    with ExitStack() as stack:
        writers = []
        for rank in ranks:
            path = directory / f"model-rank-{rank}-part-{number}.safetensors"
            writer = PartWriter(path, rank, number, part_plan, digest.ALGORITHM, executor)
            stack.callback(writer.close)
            writers.append(writer)
        for blocks in _read_ahead(source, part_plan, executor):
            for rank, block in blocks:
                writers[rank].append(block)
                progress.add(block.nbytes)
        return [writer.finish() for writer in writers]


class _Piece(NamedTuple):
    """The next elements of a rank's tensor, few enough to be read and converted at once."""

    rank: int
    dtype: str
    segment: Segment

    @property
    def rows(self) -> tuple[str, tuple[int, int]] | None:
        """Which rows of which source tensor it needs."""
        segment = self.segment
        return None if isinstance(segment, Fill) else (segment.source, segment.rows)


_Blocks = list[tuple[int, Array]]
"""Elements to append, by rank; they may lie in a buffer that is used again."""


def _read_ahead(source: Source, part_plan: PartPlan, executor: Executor) -> Iterator[_Blocks]:
    """Yield what to append, in order, while `executor` makes the _BLOCKS_AHEAD next ones."""
    buffers = cycle([AlignedBuffer() for _ in range(_BLOCKS_AHEAD + 1)])
    ahead: deque[Future[_Blocks]] = deque()
    for _, pieces in groupby(_pieces(source, part_plan), lambda piece: piece.rows):
        ahead.append(executor.submit(_read, source, list(pieces), next(buffers)))
        if len(ahead) > _BLOCKS_AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _read(source: Source, pieces: list[_Piece], buffer: AlignedBuffer) -> _Blocks:
    """Read the rows that the pieces have in common, once, and cut and convert them."""
    rows: Array | None = None
    blocks = []
    for rank, dtype, segment in pieces:
        if isinstance(segment, Fill):
            block, found = np.full(segment.elements, segment.value, STORAGE["F32"]), "F32"
        else:
            if rows is None:
                rows = source.read(segment.source, segment.rows, buffer)
            block, found = rows[:, slice(*segment.columns)], source.tensors[segment.source].dtype
        blocks.append((rank, convert(block, found, dtype)))
    return blocks


def _pieces(source: Source, part_plan: PartPlan) -> Iterator[_Piece]:
    for tensor in part_plan.tensors:
        for row in zip_longest(*(_cut(source, segments) for segments in tensor.by_rank)):
            for rank, segment in enumerate(row):
                if segment is not None:
                    yield _Piece(rank, tensor.dtype, segment)


def _cut(source: Source, segments: Iterable[Segment]) -> Iterator[Segment]:
    """Cut a rank's segments into blocks."""
    for segment in segments:
        if isinstance(segment, Fill):
            for begin in range(0, segment.elements, BLOCK_BYTES):
                yield Fill(min(BLOCK_BYTES, segment.elements - begin), segment.value)
        else:
            for rows in _row_blocks(segment.rows, source.row_bytes(segment.source)):
                yield Slice(segment.source, rows, segment.columns)


def _row_blocks(rows: tuple[int, int], row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // row_bytes)
    for begin in range(*rows, step):
        yield begin, min(begin + step, rows[1])


class _Progress:
    """Counts written bytes and logs them at intervals."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = self._logged = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._logged > _PROGRESS_SECONDS:
            self._logged = time.monotonic()
            log("progress", **self.fields())

    def fields(self) -> dict[str, object]:
        seconds = time.monotonic() - self._started
        return {
            "bytes": self._done,
            "totalBytes": self._total,
            "seconds": round(seconds, 3),
            "mibPerSecond": round(self._done / max(seconds, 1e-6) / 2**20, 1),
        }
