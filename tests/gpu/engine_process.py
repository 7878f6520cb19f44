"""An engine as a process group of its own, that can be asked and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles kernels with nvcc at the first start
    "PYTHONUNBUFFERED": "1",
}


class EngineProcess:
    """A script that prints READY and a JSON object, then ANSWER and JSON for each line it gets."""

    def __init__(self, log: Path, script: str, *arguments: object, **environment: str) -> None:
        self.log = log
        self._answers = 0
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / script), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT | environment,
                start_new_session=True,
            )

    def ready(self) -> Any:
        """Wait until it holds its weights; returns what it says then."""
        return self._marked("READY ", 1)

    def ask(self) -> Any:
        """Have it compute something with its weights."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self._answers += 1
        return self._marked("ANSWER ", self._answers)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _marked(self, marker: str, count: int, seconds: float = 400) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None
            lines = [line for line in self.output().splitlines() if line.startswith(marker)]
            if len(lines) >= count:
                return json.loads(lines[count - 1][len(marker) :])
            if ended:
                break
            time.sleep(0.05)
        raise AssertionError(
            f"no {marker}; exit code {self.process.poll()}\n{self.output()[-9000:]}"
        )
