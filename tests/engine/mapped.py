"""Where a tensor's memory is, for scripts that look at models over resident weights."""

from pathlib import Path

import torch


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in the loader's memory."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if begin <= address < end:
            return "memfd:headrace" in line
    return False
