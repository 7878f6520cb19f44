"""serve.py with a method that writes to weights after loading, as some quantizations do."""

import runpy
from pathlib import Path

from vllm.model_executor.layers.linear import UnquantizedLinearMethod


def double(self, layer):
    layer.weight.data.mul_(2)


UnquantizedLinearMethod.process_weights_after_loading = double

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("serve.py")), run_name="__main__")
