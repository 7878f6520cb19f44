"""An engine that is torch alone: python holder.py SOCKET. See engine_process.py.

READY: milliseconds that attaching took, and bytes it took from the GPU and from torch.
ANSWER: the sum of all bytes of all weights.
"""

import json
import sys
import time

import torch

from headrace_engine import attach


def free() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


if __name__ == "__main__":
    torch.zeros(1, device="cuda")
    free_before, allocated_before = free(), torch.cuda.memory_allocated()
    began = time.monotonic()
    weights = attach(sys.argv[1], device="cuda")
    took = time.monotonic() - began
    ready = {
        "attach_ms": round(took * 1000, 2),
        "mapping_ms": round(weights.seconds * 1000, 2),
        "bytes": weights.nbytes,
        "copied_bytes": sum(copy.nbytes for copy in weights.copies),
        "device_bytes": free_before - free(),
        "torch_bytes": torch.cuda.memory_allocated() - allocated_before,
    }
    print(f"READY {json.dumps(ready)}", flush=True)
    for _ in sys.stdin:
        total = sum(
            int(tensor.contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64))
            for tensor in weights.values()
        )
        print(f"ANSWER {total}", flush=True)
