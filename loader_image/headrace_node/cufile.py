"""The cuFile configuration (/etc/cufile.json) that fits a node.

Source of the keys: NVIDIA's "GPUDirect Storage Benchmarking and Configuration Guide", cuFile
configuration. Sizes are in KiB. Lustre is a file system of the kernel, whose reads go through LNet,
so the RDMA addresses that user-space file systems need stay empty.
"""

import json

from headrace_node.facts import Facts

PATH = "/etc/cufile.json"
_GPU_MEMORY_KB = 512 << 20
"""512 GiB, above any GPU: what may be registered at a time. A shard above it fails with 5030."""


def configuration(facts: Facts) -> str:
    """Return the file's content.

    Where GPUDirect Storage is not verified, compatibility mode stays allowed: a load then is
    slow, and Headrace says so, instead of failing for whoever else uses cuFile on the node.
    """
    document = {
        "logging": {"level": "ERROR"},
        "profile": {"nvtx": False, "cufile_stats": 0},
        "execution": {
            "max_io_queue_depth": 128,
            "max_io_threads": 4,
            "parallel_io": True,
            "min_io_threshold_size_kb": 8192,
            "max_request_parallelism": 4,
        },
        "properties": {
            "max_direct_io_size_kb": 16384,
            "max_device_cache_size_kb": 131072,
            "max_device_pinned_mem_size_kb": _GPU_MEMORY_KB,
            "use_poll_mode": False,
            "allow_compat_mode": facts.gds != "verified",
            "gds_rdma_write_support": False,
            "io_batchsize": 128,
            "rdma_dev_addr_list": [],
        },
        "fs": {
            "generic": {"posix_unaligned_writes": False},
            "lustre": {"posix_gds_min_kb": 0, "rdma_dev_addr_list": []},
        },
        "denylist": {"drivers": [], "devices": [], "mounts": [], "filesystems": []},
    }
    return json.dumps(document, indent=2) + "\n"
