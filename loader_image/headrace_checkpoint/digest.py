"""Digests of weight data: one 64-bit multilinear sum per chunk.

Weights have to be checked at the rate they are loaded, on the GPU as well as on
a CPU. A cryptographic hash cannot do that (SHA-256 runs at 1 to 2 GiB/s per core),
so a chunk's digest is the multilinear hash

    d = sum over i of w[i] * m[i]   modulo 2**64
    m[i] = splitmix64(i) | 1

over its little-endian 64-bit words w[0], w[1], ..., the last one padded with zero
bytes. The multipliers are odd, so flipping any single bit always changes the
digest; for other accidental damage the chance to go unnoticed is about 2**-64.
It protects against corruption, not against somebody who forges a checkpoint.

Sources: D. Lemire and O. Kaser, "Strongly universal string hashing is fast", The
Computer Journal 57 (2014), section 2 (MULTILINEAR); G. Steele, D. Lea and C. Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014 (splitmix64).
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace_checkpoint.manifest import MULTILINEAR64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Buffer = bytes | bytearray | memoryview | NDArray[Any]

ALGORITHM = MULTILINEAR64
WORD = 8


@functools.lru_cache(maxsize=2)
def _multipliers(words: int) -> NDArray[np.uint64]:
    """m[0..words) as uint64: splitmix64 of the index, made odd."""
    z = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def _octets(data: Buffer) -> NDArray[np.uint8]:
    return np.frombuffer(data, dtype=np.uint8)


def chunk_digest(chunk: Buffer, chunk_bytes: int) -> str:
    """Digest of one chunk as 16 hex digits; `chunk` holds at most `chunk_bytes` bytes.

    `chunk_bytes` (a multiple of 8) only sizes the multiplier table shared by all
    chunks of a file; it does not enter the digest.
    """
    data = _octets(chunk)
    whole = len(data) // WORD
    multipliers = _multipliers(chunk_bytes // WORD)
    total = int(np.dot(data[: whole * WORD].view("<u8"), multipliers[:whole])) if whole else 0
    if tail := data[whole * WORD :].tobytes():
        total += int.from_bytes(tail, "little") * int(multipliers[whole])
    return f"{total % 2**64:016x}"


def chunk_digests(data: Buffer, chunk_bytes: int) -> Iterator[str]:
    """Digests of consecutive `chunk_bytes` pieces of `data`, the last one possibly short."""
    view = _octets(data)
    for start in range(0, len(view), chunk_bytes):
        yield chunk_digest(view[start : start + chunk_bytes], chunk_bytes)


def digester(algorithm: str, chunk_bytes: int) -> Callable[[Buffer], str]:
    """Return the function that gives a chunk's hex digest, by the manifest's algorithm name.

    Raises KeyError for a name that the manifest would not accept either.
    """
    functions: dict[str, Callable[[Buffer], str]] = {
        "sha256": lambda chunk: hashlib.sha256(_octets(chunk).data).hexdigest(),
        ALGORITHM: lambda chunk: chunk_digest(chunk, chunk_bytes),
    }
    return functions[algorithm]
