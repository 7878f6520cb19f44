"""Makes a checkpoint from a source model: plan, write, digest, publish."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headrace_checkpoint import digest
from headrace_checkpoint.blocks import read_ahead, row_blocks
from headrace_checkpoint.errors import (
    CheckpointError,
    ConfigInvalid,
    DigestMismatch,
    SourceChanged,
    StorageError,
)
from headrace_checkpoint.layouts import LAYOUTS
from headrace_checkpoint.manifest import (
    CHUNK_BYTES,
    MAX_PARTS,
    CopiedFile,
    Manifest,
    Parallelism,
    Part,
    copied_files,
)
from headrace_checkpoint.places import find_place
from headrace_checkpoint.plan import DEFAULT_PART_BYTES, PartPlan, Plan, in_parts, most_parts
from headrace_checkpoint.planner import plan, resolve_dtype
from headrace_checkpoint.progress import Progress
from headrace_checkpoint.publish import find_published
from headrace_checkpoint.report import log
from headrace_checkpoint.source import Source
from headrace_checkpoint.staging import Staging, collect_leftovers, join
from headrace_checkpoint.storage import (
    AlignedBuffer,
    check_free_space,
    make_directories,
    write_file,
)
from headrace_checkpoint.striping import check_striping, set_striping
from headrace_checkpoint.verifier import compare_source, verify_part
from headrace_checkpoint.writer import PartWriter

# They mostly wait for the disk, which needs several transfers under way. Readers are threads of
# their own: behind a queue of chunks to be written, none would be read meanwhile.
_WRITERS = 8
_READERS = 4
_SMALLEST_PART_BYTES = 64 * 1024 * 1024
_WRITER = 1  # one more whenever other bytes are written for the same request


class Executors(NamedTuple):
    """Threads that read blocks, and threads that digest and write chunks."""

    reading: Executor
    writing: Executor


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """What to make; `identity` is stored in the manifest and tells checkpoints apart.

    `source` is a directory, s3://BUCKET/PREFIX or hf://OWNER/NAME, of which `revision` is a branch,
    tag or commit. `dtype` is auto, bfloat16, float16 or float32. `quantization` fp8 makes FP8 of an
    unquantized model. The work is shared out to `workers` processes, of which this is number
    `worker`.
    """

    source: Path | str
    output: Path
    tensor_parallel_size: int
    identity: Mapping[str, object]
    dtype: str = "auto"
    layout: str = "vllm"
    part_bytes: int | None = None
    revision: str = "main"
    workers: int = 1
    worker: int = 0
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    quantization: str = "none"


@dataclass(frozen=True)
class ShardResult:
    """How it ended: `reason` is Published, AlreadyPublished, or PartsWritten.

    With PartsWritten, this worker has done its share and others have not yet.
    """

    reason: str
    total_bytes: int


def shard(request: ShardRequest) -> ShardResult:
    """Write this worker's parts, and publish the checkpoint once all are there.

    Raises the errors of headrace_checkpoint.errors; whatever is raised, nothing but a
    whole checkpoint is ever visible at `request.output`.
    """
    collect_leftovers(request.output)
    manifest = find_published(request.output, request.identity)
    if manifest is not None:
        collect_leftovers(request.output, also_work=True)
        _compare_source(request, manifest)
        return ShardResult("AlreadyPublished", manifest.total_bytes)
    try:
        with Source(find_place(str(request.source), request.revision)) as source:
            return _make(request, source)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        # Whoever publishes takes the staging directory away from the others.
        manifest = find_published(request.output, request.identity)
        if manifest is None:
            raise
        return ShardResult("AlreadyPublished", manifest.total_bytes)


def _compare_source(request: ShardRequest, published: Manifest) -> None:
    """Raise SourceChanged where the source can be read and is not what was published."""
    try:
        compare_source(published, str(request.source), request.revision, str(request.output))
    except SourceChanged:
        raise
    except CheckpointError as error:
        # What is published is whole, and can be served when its source is long gone.
        log("source-not-compared", "warning", error=str(error))


def _make(request: ShardRequest, source: Source) -> ShardResult:
    checkpoint_plan = _plan(request, source)
    fingerprints = [file.to_object() for file in source.fingerprints()]
    terms = {
        "writer": _WRITER,
        "identity": dict(request.identity),
        "source": fingerprints,
        "dtype": request.dtype,
        "layout": request.layout,
        "tensorParallelSize": request.tensor_parallel_size,
        "pipelineParallelSize": request.pipeline_parallel_size,
        "expertParallelSize": request.expert_parallel_size,
        "quantization": request.quantization,
    }
    # The same as what a plan read back from JSON has.
    terms = json.loads(json.dumps(terms))
    part_bytes = _part_bytes(request, checkpoint_plan)

    def prepare(directory: Path) -> dict[str, object]:
        largest = max(part.data_bytes for part in checkpoint_plan.parts)
        stripes = set_striping(directory, min(part_bytes, largest))
        data = directory / "checkpoint"
        make_directories(data)
        files = [_copy(source, name, data).to_object() for name in source.files_to_copy]
        return {"partBytes": part_bytes, "stripes": stripes, "files": files}

    with join(request.output, terms, prepare) as staging:
        checkpoint_plan = in_parts(checkpoint_plan, staging.plan["partBytes"])
        worker = _Worker(request, source, checkpoint_plan, staging)
        worker.write()
        missing = set(range(len(checkpoint_plan.parts))) - staging.recorded()
        total = checkpoint_plan.total_bytes
        if missing:
            log("parts-missing", parts=len(missing), reason="other workers have them")
            return ShardResult("PartsWritten", total)
        published = staging.publish(worker.manifest())
    if not published and find_published(request.output, request.identity) is None:
        raise StorageError(f"{request.output}: appeared and vanished while it was published")
    return ShardResult("Published" if published else "AlreadyPublished", total)


def _part_bytes(request: ShardRequest, checkpoint_plan: Plan) -> int:
    """Bytes at which parts are closed: some for every worker, not more than can be loaded."""
    ranks = request.tensor_parallel_size * request.pipeline_parallel_size
    share = checkpoint_plan.total_bytes // ranks // request.workers
    part_bytes = request.part_bytes or max(_SMALLEST_PART_BYTES, min(DEFAULT_PART_BYTES, share))
    while most_parts(in_parts(checkpoint_plan, part_bytes)) > MAX_PARTS:
        part_bytes *= 2
    return part_bytes


class _Worker:
    """Writes the parts of one worker, and others that nobody has begun."""

    def __init__(
        self, request: ShardRequest, source: Source, checkpoint_plan: Plan, staging: Staging
    ) -> None:
        self._request = request
        self._source = source
        self._plan = checkpoint_plan
        self._staging = staging
        shares = assign([part.data_bytes for part in checkpoint_plan.parts], request.workers)
        self._own = shares[request.worker]
        self._others = [number for share in shares if share is not self._own for number in share]
        # What was recorded before is read once more; what is from now on was just written.
        self._unverified = staging.recorded() & set(self._own)

    def write(self) -> None:
        """Return when all of this worker's parts are recorded."""
        todo = [number for number in self._own if not self._is_done(number)]
        ranks = self._request.tensor_parallel_size
        total = ranks * sum(self._plan.parts[number].data_bytes for number in todo)
        check_free_space(self._staging.path, total)
        if len(todo) < len(self._own):
            log("resumed", parts=len(self._own) - len(todo), left=len(todo))
        with (
            ThreadPoolExecutor(_READERS) as readers,
            ThreadPoolExecutor(_WRITERS) as writers,
            Progress(total) as progress,
        ):
            executors = Executors(readers, writers)
            # Two writers of one part are one too many, but none without locks is too few.
            others = self._others if self._staging.has_locks else []
            for number in (*todo, *others):
                self._write_part(number, executors, progress)
            for number in todo:
                attempt = functools.partial(self._write_part, number, executors, progress)
                if not self._staging.wait(attempt):
                    log("other-writer-overtaken", "warning", part=number)
                    attempt(anyway=True)

    def manifest(self) -> Manifest:
        """Return the manifest of the whole; raises StorageError where a part is not as recorded."""
        parts: list[Part] = []
        for number in range(len(self._plan.parts)):
            found = self._staging.part(number)
            if found is None or not self._has_files(found):
                if not self._staging.data.exists():
                    # Taken away by whoever has published meanwhile, as `shard` will see.
                    raise StorageError(f"{self._staging.data}: is gone") from FileNotFoundError()
                self._staging.reject(number, "its files are missing or of another size")
                raise StorageError(
                    f"{self._staging.path}: part {number} was lost; run the command again"
                )
            parts += found
        if self._staging.plan["stripes"]:
            files = [part.file for part in parts]
            check_striping(self._staging.data, files, self._staging.plan["stripes"])
        return Manifest(
            layout=self._request.layout,
            identity=dict(self._request.identity),
            architecture=self._plan.architecture,
            parallelism=Parallelism(
                tensor=self._request.tensor_parallel_size,
                pipeline=self._request.pipeline_parallel_size,
                expert=self._request.expert_parallel_size,
            ),
            chunk_bytes=CHUNK_BYTES,
            parts=tuple(sorted(parts, key=lambda part: (part.rank, part.part))),
            files=copied_files(self._staging.plan["files"]),
            digest_algorithm=digest.ALGORITHM,
            source=copied_files(self._staging.plan["terms"]["source"]),
        )

    def _write_part(
        self, number: int, executors: Executors, progress: Progress, *, anyway: bool = False
    ) -> bool:
        """Write a part unless it is done; False where another writer has it under way."""
        if self._is_done(number):
            return True
        with self._staging.claim(number) as claimed:
            if not (claimed or anyway):
                return False
            if self._is_done(number):
                return True
            plan_of_part = self._plan.parts[number]
            parts = _write_part(self._source, plan_of_part, self._staging.mine, executors, progress)
            self._source.check_unchanged()
            self._staging.record(number, tuple(parts))
        log("part-written", part=number, **progress.fields())
        return True

    def _is_done(self, number: int) -> bool:
        parts = self._staging.part(number)
        if parts is None:
            return False
        if number in self._unverified:
            self._unverified.discard(number)
            error = self._error(number, parts)
            if error:
                self._staging.reject(number, error)
                return False
        return True

    def _error(self, number: int, parts: tuple[Part, ...]) -> str | None:
        """What is wrong with a part that an earlier run has written: every byte is read."""
        entries = self._plan.parts[number].entries
        if len(parts) != self._request.tensor_parallel_size or any(
            part.tensors != entries for part in parts
        ):
            return "it has other tensors than planned"
        try:
            for part in parts:
                verify_part(self._staging.data, part, digest.ALGORITHM, CHUNK_BYTES)
        except DigestMismatch as error:
            return str(error)
        return None

    def _has_files(self, parts: Iterable[Part]) -> bool:
        for part in parts:
            try:
                size = (self._staging.data / part.file).stat().st_size
            except FileNotFoundError:
                return False
            if size != part.file_bytes:
                return False
        return True


def assign(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Share out parts of these sizes, the largest first, each to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        least = loads.index(min(loads))
        shares[least].append(number)
        loads[least] += sizes[number]
    return [sorted(share) for share in shares]


def _plan(request: ShardRequest, source: Source) -> Plan:
    architecture = source.config.architecture(LAYOUTS[request.layout])
    source.open_weights()
    dtype = resolve_dtype(request.dtype, source.config, source.tensors)
    quantize = request.quantization == "fp8"
    if quantize:
        source.config = source.config.quantized()
    checkpoint_plan = plan(
        architecture,
        source.config,
        source.tensors,
        tensor_parallel_size=request.tensor_parallel_size,
        dtype=dtype,
        part_bytes=request.part_bytes or DEFAULT_PART_BYTES,
        pipeline_parallel_size=request.pipeline_parallel_size,
        expert_parallel_size=request.expert_parallel_size,
        quantize=quantize,
    )
    source.config = source.config.serving(checkpoint_plan.quantized, checkpoint_plan.unquantized)
    for copy, original in checkpoint_plan.equal:
        _check_equal(source, copy, original)
    log(
        "planned",
        architecture=architecture.name,
        dtype=dtype,
        tensorParallelSize=request.tensor_parallel_size,
        quantization=request.quantization,
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
            for rows in row_blocks((0, first.shape[0]), source.row_bytes(copy))
        )
    if not same:
        raise ConfigInvalid(
            f"config.json: tie_word_embeddings: true, but {copy!r} differs from {original!r}; "
            "set it to false, or remove the tensor"
        )


def _copy(source: Source, name: str, directory: Path) -> CopiedFile:
    content = source.config.content if name == "config.json" else source.read_small_file(name)
    write_file(directory / name, content)
    return CopiedFile(name, len(content), hashlib.sha256(content).hexdigest())


def _write_part(
    source: Source,
    part_plan: PartPlan,
    directory: Path,
    executors: Executors,
    progress: Progress,
) -> list[Part]:
    """Write one part of all ranks side by side, so that each source block is read once."""
    with ExitStack() as stack:
        writers = []
        for rank in part_plan.ranks:
            path = directory / part_plan.file(rank)
            writer = PartWriter(
                path, rank, part_plan.number, part_plan, digest.ALGORITHM, executors.writing
            )
            stack.callback(writer.close)
            writers.append(writer)
        for blocks in read_ahead(source, part_plan, executors.reading):
            for rank, block in blocks:
                writers[rank].append(block)
                progress.add(block.nbytes)
        parts = [writer.finish() for writer in writers]
        list(executors.writing.map(PartWriter.sync, writers))
        return parts
