"""Kinds of GPU nodes: what a pod needs there, as data.

Sources, all of AWS: instance types and GPUs, "Amazon EC2 accelerated computing instance
specifications"; EFA interfaces, "Maximize network bandwidth on instances with multiple network
cards" (for P6-B300 16 cards of 400 Gbps make its 6400 Gbps, the seventeenth has no EFA; for
P6e-GB200 one EFA-only interface of 400 Gbps per GPU, on cards 1, 5, 9 and 13, the first of the
two recommended ways to its 1600 Gbps); the resource's name and 5120 MiB of huge pages, "Run
machine learning training on Amazon EKS with Elastic Fabric Adapter".
Not run on these instances.
"""

from dataclasses import dataclass

EFA_RESOURCE = "vpc.amazonaws.com/efa"
HUGE_PAGES_RESOURCE = "hugepages-2Mi"
INSTANCE_TYPE_LABEL = "node.kubernetes.io/instance-type"


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of node. `gpus` and `efa_interfaces` are per node."""

    instance_types: tuple[str, ...]
    architecture: str
    gpus: int
    efa_interfaces: int
    huge_pages: str = "5120Mi"
    shared_memory: str = "64Gi"


PRESETS = {
    "P5en": Preset(("p5en.48xlarge",), "amd64", gpus=8, efa_interfaces=16),
    "P6-B200": Preset(("p6-b200.48xlarge",), "amd64", gpus=8, efa_interfaces=8),
    "P6-B300": Preset(("p6-b300.48xlarge",), "amd64", gpus=8, efa_interfaces=16),
    "P6e-GB200": Preset(("p6e-gb200.36xlarge",), "arm64", gpus=4, efa_interfaces=4),
}
