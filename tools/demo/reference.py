"""What plain vLLM answers, computed in the background while other things take their time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from workspace.errors import ToolError
from workspace.paths import ROOT
from workspace.process import tail

if TYPE_CHECKING:
    from types import TracebackType

SECONDS = 600.0
STOP_SECONDS = 10.0
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT / "tools"),
    "VLLM_PLUGINS": "",  # none, Headrace's own included
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # as in the engine's image
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class PlainAnswer:
    """A run of plain vLLM on the unsharded model, as a context manager that leaves no process."""

    def __init__(self, model: Path, prompt: str, *, tokens: int, tensor_parallel_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-plain-vllm-")
        self._output = Path(self._folder.name) / "answer.json"
        self._log = Path(self._folder.name) / "log"
        command = [sys.executable, "-m", "demo.plain_vllm", "--model", str(model)]
        command += ["--prompt", prompt, "--tokens", str(tokens), "--output", str(self._output)]
        command += ["--tensor-parallel-size", str(tensor_parallel_size)]
        cores = "|".join(str(rank) for rank in range(tensor_parallel_size))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder.name,
                env={**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_SECONDS)
        self._folder.cleanup()

    def token_ids(self) -> tuple[int, ...]:
        """Wait for the answer and return its tokens; raises ToolError with the engine's log."""
        try:
            status = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"plain vLLM: no answer in {SECONDS:g} s\n{self._said()}") from error
        if status or not self._output.exists():
            raise ToolError(f"plain vLLM: status {status}\n{self._said()}")
        return tuple(json.loads(self._output.read_text())["token_ids"])

    def _said(self) -> str:
        return tail(self._log.read_text(errors="replace"))
