"""Moves runs from the page cache by compiled code, mover.c."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from headrace_loader.cuda import driver, native
from headrace_loader.cuda.digester import BLOCKS_PER_CHUNK, THREADS
from headrace_loader.cuda.runs import WORD, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from headrace_loader.cuda.digester import Digester

SLOTS = 4
"""Blocks in pinned memory at a time: one is being copied, others are being filled."""
SLOT_BYTES = 8 * 1024 * 1024
"""Bytes of the largest blocks. With more in all slots the caches lose them before the copy."""
FIRST_BYTES = 512 * 1024
"""Bytes of the first block; each is twice the one before."""
PIECE_BYTES = 512 * 1024
"""Bytes that one thread reads at once."""
_REPORT_SECONDS = 0.05


class CompiledLoad:
    """Runs, to be moved through `pinned`; `moved` is told of bytes while they come.

    All that can be done before the first byte is done before `move`. Threads start here: cores
    that slept read half as fast for two milliseconds, which a GPU takes anyway to get ready.
    Direct reads are left out: storage is slower than the interpreter.
    """

    def __init__(
        self,
        mover: native.Mover,
        pinned: driver.HostBuffer,
        threads: int,
        runs: Sequence[Run],
        moved: Callable[[int], None],
    ) -> None:
        self._mover = mover
        self._all = runs
        self._taken = [run for run in runs if run.file.buffered_reason]
        self._pinned = pinned  # it has to live
        slot_bytes = min(SLOT_BYTES, pinned.size // SLOTS // WORD * WORD)
        self._load = native.Load(
            *map(driver.address, native.CALLS),
            runs=(native.Run * len(self._taken))(*map(_run, self._taken)),
            slots=(native.Slot * SLOTS)(
                *(native.Slot(pinned.address + n * slot_bytes) for n in range(SLOTS))
            ),
            run_count=len(self._taken),
            slot_count=SLOTS,
            thread_count=threads,
            slot_bytes=slot_bytes,
            piece_bytes=PIECE_BYTES,
            blocks=BLOCKS_PER_CHUNK,
            threads=THREADS,
            next_bytes=min(FIRST_BYTES, slot_bytes),
        )
        self._teller = Teller(self._load, moved)
        self._teller.start()  # before threads that have to be ended if it fails
        mover.prepare(self._load)

    def ready(self, digester: Digester) -> None:
        """Make what is needed on the GPU and use it: first times are long; `pinned` is pinned."""
        self._copies, self._digests = driver.Stream(), driver.Stream()
        self._events = [driver.Event() for _ in range(SLOTS)]
        load = self._load
        load.kernel = digester.kernel
        load.copies, load.digests = self._copies.handle, self._digests.handle
        for n, event in enumerate(self._events):
            load.slots[n].event = event.handle
        for n, run in enumerate(self._taken):
            load.runs[n].digests = digester.place(run.index)
        first = self._taken[0]
        nbytes = max(min(first.end - first.begin, load.next_bytes) // WORD, 1) * WORD
        self._copies.copy_to_device(first.pointer, self._pinned.address, nbytes)
        self._events[0].record(self._copies)
        digester.warm(self._digests, first.pointer)
        digester.results((self._digests, self._copies))
        self._mover.wake(load)

    def close(self) -> None:
        """End the threads, once what was queued is done; they use what this object has."""
        if not self._load.begun:
            self._load.failed = 1
            self._mover.load(self._load)
            self._teller.end()
        self._mover.release(self._load)

    def move(self) -> list[Run]:
        """Move them; returns those left over, where something failed or reads are direct.

        If there are any, nothing reads the pinned memory any more. If not, all that was queued is
        done when `stream` has done its work.
        """
        self._mover.load(self._load)
        self._teller.end()
        done = {run for n, run in enumerate(self._taken) if self._load.runs[n].done}
        left = [run for run in self._all if run not in done]
        if left:
            self._copies.synchronize()
            self._mover.release(self._load)
        return left

    @property
    def stream(self) -> driver.Stream:
        """Where digests are queued, each behind the copies of what it is of."""
        return self._digests


class Teller:
    """Tells `moved` of the bytes of a load, now and then and at the end."""

    def __init__(self, load: native.Load, moved: Callable[[int], None]) -> None:
        self._load, self._moved = load, moved
        self._told = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to tell, from a thread."""
        threading.Thread(target=self._tell_often, daemon=True).start()

    def end(self) -> None:
        """Tell the rest."""
        self._ended.set()
        self._tell()

    def _tell_often(self) -> None:
        while not self._ended.wait(_REPORT_SECONDS):
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            if new := self._load.moved - self._told:
                self._told += new
                self._moved(new)


def _run(run: Run) -> native.Run:
    source = run.file.source
    offset, nbytes = source.offset + run.begin, run.end - run.begin
    return native.Run(offset, nbytes, run.pointer, source.chunk_bytes, file=run.file.fileno())
