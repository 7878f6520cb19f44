"""Moves runs from the page cache by compiled code, mover.c."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from headrace_loader.cuda import driver, native
from headrace_loader.cuda.digester import BLOCKS_PER_CHUNK, THREADS
from headrace_loader.cuda.runs import PIECE_BYTES, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from headrace_loader.cuda.digester import Digester
    from headrace_loader.cuda.driver import Device
    from headrace_loader.cuda.lanes import StagedLane

_REPORT_SECONDS = 0.02


class CompiledLoad:
    """Runs, ready to be moved by `lanes`; `moved` is told of bytes while they come.

    All that can be done before the first byte is done here. Direct reads are left out: storage
    is slower than the interpreter.
    """

    def __init__(
        self,
        device: Device,
        digester: Digester,
        lanes: Sequence[StagedLane],
        runs: Sequence[Run],
        moved: Callable[[int], None],
    ) -> None:
        self._all = runs
        self._taken = [run for run in runs if run.file.buffered_reason]
        self._lanes = lanes  # their buffers have to live
        self._moved = moved
        self._load = _structure(device, digester, lanes, self._taken)
        self._ended = threading.Event()
        self._teller = threading.Thread(target=self._tell, daemon=True)
        self._teller.start()

    def move(self, mover: Any) -> list[Run]:  # noqa: ANN401 - as native.mover
        """Move them; returns those left over, where something failed or reads are direct."""
        mover(self._load)
        self._ended.set()
        self._teller.join()
        done = {run for n, run in enumerate(self._taken) if self._load.runs[n].done}
        return [run for run in self._all if run not in done]

    def _tell(self) -> None:
        ended, told = False, 0
        while not ended:
            ended = self._ended.wait(_REPORT_SECONDS)
            if new := self._load.moved - told:
                told += new
                self._moved(new)


def _structure(
    device: Device, digester: Digester, lanes: Sequence[StagedLane], runs: Sequence[Run]
) -> native.Load:
    return native.Load(
        *map(driver.address, native.CALLS),
        device.context,
        digester.kernel,
        (native.Run * len(runs))(*(_run(run, digester) for run in runs)),
        (native.Lane * len(lanes))(*(lane.native() for lane in lanes)),
        run_count=len(runs),
        lane_count=len(lanes),
        piece=PIECE_BYTES,
        blocks=BLOCKS_PER_CHUNK,
        threads=THREADS,
    )


def _run(run: Run, digester: Digester) -> native.Run:
    source = run.file.source
    return native.Run(
        source.offset + run.begin,
        run.end - run.begin,
        run.pointer,
        source.chunk_bytes,
        digester.place(run.index),
        run.file.fileno(),
    )
