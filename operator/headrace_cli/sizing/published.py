"""AWS's published measurements, and how near the prediction comes.

Source: aws-samples/sample-fsx-lustre-gds-sharded-model-loading, README at 00a0522a (and
a16cc52f for the old loader): one p5en.48xlarge, 96000 GiB at 1000 MB/s/TiB, EFA, client page cache
dropped, tensor parallel size 8.
"""

from dataclasses import dataclass

from headrace_cli.sizing.hardware import INSTANCES
from headrace_cli.sizing.predict import FileSystem, Node, predict_load

STORAGE = FileSystem(96000, 1000)
_P5EN = INSTANCES["p5en.48xlarge"]
NODE = Node(_P5EN.gpus, _P5EN.nics, _P5EN.nic_gbps, _P5EN.pcie)
TOLERANCE = 0.15

_CONSTRUCTOR = (
    "times the engine's whole constructor: start, load through the CPU, compilation; "
    "the prediction is of the load by GPUDirect alone"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One published measurement: bytes loaded, seconds, and why it is not predicted."""

    case: str
    total_bytes: int
    seconds: float
    unpredicted: str = ""

    @property
    def predicted(self) -> float | None:
        """Seconds that the prediction gives; None where it does not apply."""
        if self.unpredicted:
            return None
        return predict_load(self.total_bytes, STORAGE, NODE).seconds

    @property
    def error(self) -> float | None:
        """Relative error of the prediction: positive when it is too long."""
        predicted = self.predicted
        return None if predicted is None else predicted / self.seconds - 1


ROWS = (
    Row("Llama 405B BF16, GPUDirect", 812 * 10**9, 10.4),
    Row("Llama 405B FP8, GPUDirect", 408 * 10**9, 6.4),
    Row("Llama 70B BF16, GPUDirect", 141 * 10**9, 2.17),
    Row("Llama 70B FP8, GPUDirect", 72 * 10**9, 1.28),
    Row("Llama 405B BF16, vLLM sharded_state", 812 * 10**9, 111.0, _CONSTRUCTOR),
    Row("Llama 70B BF16, vLLM sharded_state", 141 * 10**9, 50.5, _CONSTRUCTOR),
    Row("Llama 405B, vLLM from the Hub's files", 812 * 10**9, 162.4, _CONSTRUCTOR),
    Row("Llama 70B, vLLM from the Hub's files", 141 * 10**9, 66.1, _CONSTRUCTOR),
    Row("Llama 405B, vLLM before V1", 812 * 10**9, 18 * 60.0, _CONSTRUCTOR),
    Row("Llama 70B, vLLM before V1", 141 * 10**9, 3 * 60.0, _CONSTRUCTOR),
)
