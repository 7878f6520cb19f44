"""What differs between the versions of vLLM that the plugin works with (docs/engines.md)."""

import copy
import sys
from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

if TYPE_CHECKING:
    from vllm.config import CacheConfig
    from vllm.utils.mem_utils import MemorySnapshot

_GPU_WORKER = "vllm.v1.worker.gpu_worker"


def leave_room_for_external_weights(load_format: str) -> None:
    """Take the loader's memory out of the engine's budget, in a vLLM that cannot by itself.

    Later versions ask a model loader for `get_external_weight_memory`. Earlier ones refuse to
    start when what the loader holds leaves less than --gpu-memory-utilization free, and would
    count it twice. There, the GPU worker's `request_memory` is replaced by one that waits until the
    weights are resident, takes them for free memory, and hands out that much less.
    """
    if hasattr(BaseModelLoader, "get_external_weight_memory"):
        return
    from vllm.v1.worker import utils

    original = utils.request_memory

    def request_memory(init_snapshot: "MemorySnapshot", cache_config: "CacheConfig") -> int:
        config = get_current_vllm_config()
        if config.load_config.load_format != load_format:
            return original(init_snapshot, cache_config)
        external = get_model_loader(config.load_config).get_external_weight_memory(config)
        init_snapshot.measure()  # it was taken before, perhaps while weights were being loaded
        without = copy.copy(init_snapshot)
        without.free_memory += external
        return original(without, cache_config) - external

    utils.request_memory = request_memory
    if _GPU_WORKER in sys.modules:  # it has the function under its own name
        sys.modules[_GPU_WORKER].request_memory = request_memory  # type: ignore[attr-defined]
