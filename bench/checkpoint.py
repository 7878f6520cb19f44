"""Writes a valid checkpoint of random weights, as fast as the storage takes it.

What the sharder would write for a rank of a model with these tensors: same headers, same
alignment, same digests, same manifest. Only the content of the weights has no meaning.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from headrace_checkpoint.digest import ALGORITHM, chunk_digest
from headrace_checkpoint.manifest import (
    CHUNK_BYTES,
    DATA_ALIGNMENT,
    Manifest,
    Parallelism,
    Part,
    TensorEntry,
)
from headrace_checkpoint.plan import DEFAULT_PART_BYTES
from headrace_checkpoint.safetensors_format import build_header

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIB = 1024 * 1024
_BF16_BYTES = 2


def large_tensors(nbytes: int) -> list[TensorEntry]:
    """Matrices of 64 MiB and one rest, together `nbytes` (a multiple of 256)."""
    size = 64 * MIB
    sizes = [size] * (nbytes // size) + ([nbytes % size] if nbytes % size else [])
    return [_tensor(f"layers.{n}.weight", nbytes) for n, nbytes in enumerate(sizes)]


def moe_tensors(nbytes: int, layers: int = 60, experts: int = 256) -> list[TensorEntry]:
    """Three matrices per expert, equal but for the last, together `nbytes`."""
    names = [
        f"layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight"
        for layer in range(layers)
        for expert in range(experts)
        for kind in ("gate", "up", "down")
    ]
    size = nbytes // len(names) // 256 * 256
    last = nbytes - size * (len(names) - 1)
    return [_tensor(name, size) for name in names[:-1]] + [_tensor(names[-1], last)]


def _tensor(name: str, nbytes: int) -> TensorEntry:
    return TensorEntry(name, "BF16", (nbytes // _BF16_BYTES,), 0, nbytes)


def write_checkpoint(directory: Path, tensors: Sequence[TensorEntry], ranks: int = 1) -> Manifest:
    """Write part files and manifest.json into a new directory; each rank has all `tensors`."""
    directory.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        parts = [
            _write_part(directory, rank, number, group, executor)
            for rank in range(ranks)
            for number, group in enumerate(_groups(tensors))
        ]
    manifest = Manifest(
        layout="vllm",
        identity={},
        architecture="BenchForCausalLM",
        parallelism=Parallelism(ranks),
        chunk_bytes=CHUNK_BYTES,
        parts=tuple(parts),
        files=(),
        digest_algorithm=ALGORITHM,
    )
    (directory / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def _groups(tensors: Sequence[TensorEntry]) -> list[list[TensorEntry]]:
    """Cut into parts as the planner does, offsets set."""
    groups: list[list[TensorEntry]] = [[]]
    end = 0
    for tensor in tensors:
        if groups[-1] and end + tensor.nbytes > DEFAULT_PART_BYTES:
            groups.append([])
            end = 0
        placed = TensorEntry(tensor.name, tensor.dtype, tensor.shape, end, tensor.nbytes)
        groups[-1].append(placed)
        end += tensor.nbytes
    return groups


def _write_part(
    directory: Path,
    rank: int,
    number: int,
    tensors: Sequence[TensorEntry],
    executor: ThreadPoolExecutor,
) -> Part:
    header = build_header(tensors, alignment=DATA_ALIGNMENT)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    path = directory / f"model-rank-{rank}-part-{number}.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)
        file.flush()

        def write(begin: int) -> str:
            data = os.urandom(min(CHUNK_BYTES, nbytes - begin))
            os.pwrite(file.fileno(), data, len(header) + begin)
            return chunk_digest(data, CHUNK_BYTES)

        digests = tuple(executor.map(write, range(0, nbytes, CHUNK_BYTES)))
        os.fsync(file.fileno())
    size = len(header)
    return Part(rank, number, path.name, size + nbytes, size, nbytes, digests, tuple(tensors))
