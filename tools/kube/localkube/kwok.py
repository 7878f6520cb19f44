"""Simulated nodes: kwok plays the kubelet for Node objects that have its annotation."""

from __future__ import annotations

from pathlib import Path

DEFAULT_STAGES = Path(__file__).parent / "kwok-stages.yaml"
ANNOTATION = "kwok.x-k8s.io/node"
LEASE_SECONDS = 40


def command(binary: Path, kubeconfig: Path, stages: Path) -> list[str | Path]:
    """Return the command line of kwok; it leaves nodes without the annotation alone."""
    return [
        binary,
        f"--kubeconfig={kubeconfig}",
        f"--config={stages}",
        f"--manage-nodes-with-annotation-selector={ANNOTATION}=fake",
        f"--node-lease-duration-seconds={LEASE_SECONDS}",
        "--cidr=198.18.0.0/15",
        "--node-ip=198.51.100.1",
    ]


def node_manifest(name: str) -> dict[str, object]:
    """Return a Node that kwok takes care of."""
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {ANNOTATION: "fake"},
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "type": "kwok",
            },
        },
    }
