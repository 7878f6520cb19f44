"""SGLang for its tests."""

import os
from pathlib import Path

import pytest

from headrace_loader.plugin import copy_engine_side
from workspace import sglang


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that finds SGLang and, as in a pod, the plugin."""
    plugin = tmp_path_factory.mktemp("plugin")
    copy_engine_side(plugin)
    path = (plugin, sglang.ensure(), Path(__file__).parent / "kernels")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|0",  # ranks may share a NUMA node
        "SGLANG_NCCL_SO_PATH": "none",  # torch's would be used, which is for GPUs
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # their memory is the machine's
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
