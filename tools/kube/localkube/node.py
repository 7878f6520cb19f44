"""containerd, kubelet and kube-proxy: their configuration and command lines.

JSON is YAML, so the standard library writes the configuration of kubelet and kube-proxy; a
JSON string is a TOML string too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .files import write_private
from .prerequisites import PLUGIN_DIRECTORIES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .layout import Layout
    from .network import Addresses

NODE_NAME = "localkube"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
SANDBOX_IMAGE = "localhost/pause:1"
BRIDGE = "cni0"
EVICTION_SIGNALS = (
    "memory.available",
    "nodefs.available",
    "nodefs.inodesFree",
    "imagefs.available",
    "imagefs.inodesFree",
)

Predicate = Callable[[Any], bool]


def containerd(binary: Path, layout: Layout, shim: Path, snapshotter: str) -> list[str | Path]:
    """Write the configuration of containerd and return its command line."""
    config = layout.config / "containerd.toml"
    plugins = ", ".join(json.dumps(folder) for folder in PLUGIN_DIRECTORIES)
    write_private(
        config,
        f"""version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri"]

[grpc]
address = {json.dumps(CONTAINERD_SOCKET)}

[plugins.'io.containerd.cri.v1.images']
snapshotter = {json.dumps(snapshotter)}

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = {json.dumps(SANDBOX_IMAGE)}

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [{plugins}]
conf_dir = {json.dumps(str(layout.config / "cni"))}

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
runtime_path = {json.dumps(str(shim))}
""",
    )
    return [binary, "--config", config]


def pod_network(layout: Layout, addresses: Addresses) -> None:
    """Write the CNI configuration: a bridge, without address translation.

    The machine has a route to the pods, so their own addresses are good everywhere.
    """
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipMasq": False,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": str(addresses.pods)}]]},
    }
    config = {"cniVersion": "1.0.0", "name": "localkube", "plugins": [bridge]}
    write_private(layout.config / "cni" / "10-localkube.conflist", json.dumps(config))


def kubelet(
    binary: Path, layout: Layout, addresses: Addresses, cgroup_root: str, kubeconfig: Path
) -> list[str | Path]:
    """Write the configuration of the kubelet and return its command line."""
    resolver = layout.config / "resolv.conf"
    # Pods reach nothing outside; names that are not found at once must not wait for a server.
    write_private(resolver, "")
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(layout.pki / "kubelet-server.crt"),
        "tlsPrivateKeyFile": str(layout.pki / "kubelet-server.key"),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup_root,
        "failCgroupV1": False,
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "makeIPTablesUtilChains": False,
        "resolvConf": str(resolver),
        "podLogsDir": "/var/log/pods",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        # A full disk or memory is for the test to notice, not for the node to act upon.
        "evictionHard": dict.fromkeys(EVICTION_SIGNALS, "0%"),
        "imageGCHighThresholdPercent": 100,
    }
    path = layout.config / "kubelet.json"
    write_private(path, json.dumps(config, indent=2))
    flags = {
        "config": path,
        "kubeconfig": kubeconfig,
        "hostname-override": NODE_NAME,
        "node-ip": addresses.node,
        "root-dir": "/var/lib/kubelet",
    }
    return [binary, *(f"--{name}={value}" for name, value in flags.items())]


def kube_proxy(
    binary: Path, layout: Layout, addresses: Addresses, kubeconfig: Path, *, bridge_filtered: bool
) -> list[str | Path]:
    """Write the configuration of kube-proxy and return its command line.

    Two pods on the bridge answer each other directly. Unless the kernel shows it bridged
    packets (`bridge_filtered`), kube-proxy then has to put the node in between.
    """
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "hostnameOverride": NODE_NAME,
        "clusterCIDR": str(addresses.pods),
        "nftables": {"masqueradeAll": not bridge_filtered},
        # The limits of connection tracking belong to the machine.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }
    path = layout.config / "kube-proxy.json"
    write_private(path, json.dumps(config, indent=2))
    return [binary, f"--config={path}"]


def is_ready(node: dict[str, object]) -> bool:
    """Tell whether a Node object is Ready and takes pods."""
    status, spec = node.get("status"), node.get("spec")
    if not isinstance(status, dict) or not isinstance(spec, dict):
        return False
    conditions: Iterable[dict[str, str]] = status.get("conditions", ())
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and not spec.get("taints")
