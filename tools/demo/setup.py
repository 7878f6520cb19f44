"""What a cluster needs before a model can be deployed: images, volume, operator."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

from imagebuild import IMAGES
from workspace.paths import ROOT, cache_directory
from workspace.process import run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from localkube import Cluster

NAMESPACE = "headrace-system"
RELEASE = "headrace"
MODEL_SECONDS = 60.0
INSTALL_SECONDS = 120.0
USER = 1000


def prepare_node(cluster: Cluster, archives: Iterable[Path]) -> None:
    """Bring the cluster up with a real node and import the images."""
    cluster.up(node=True, images=cache_directory("node-images"))
    for archive in archives:
        cluster.import_image(archive)


def make_model(directory: Path, *options: str) -> Path:
    """Make the tiny random Llama in a directory."""
    script = ROOT / "examples" / "tiny_llama.py"
    run([sys.executable, script, directory, *options], timeout=MODEL_SECONDS)
    return directory


def make_volume(cluster: Cluster, directory: Path, claim: str, namespace: str = "default") -> None:
    """Expose a directory of this machine as a bound claim that pods of any kind may write to."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.chown(directory, USER, USER)
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{namespace}-{claim}"},
        "spec": {
            **common,
            "capacity": {"storage": "1Gi"},
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(directory), "type": "Directory"},
            "claimRef": {"name": claim, "namespace": namespace},
        },
    }
    wanted = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": claim, "namespace": namespace},
        "spec": {
            **common,
            "volumeName": f"{namespace}-{claim}",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    objects = {"apiVersion": "v1", "kind": "List", "items": [volume, wanted]}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(objects))


def install_operator(cluster: Cluster) -> None:
    """Install the chart with the images built here and wait until the operator is ready."""
    values = []
    for key, name in (("image", "headrace-operator"), ("loaderImage", "headrace-loader")):
        repository, _, tag = IMAGES[name].reference.rpartition(":")
        values += ["--set", f"{key}.repository={repository}", "--set", f"{key}.tag={tag}"]
    command = ["upgrade", "--install", RELEASE, str(ROOT / "charts" / "headrace"), *values]
    place = ["--namespace", NAMESPACE, "--create-namespace"]
    wait = ["--wait", "--timeout", f"{INSTALL_SECONDS:.0f}s"]
    helm = cluster.bin("helm")
    cluster.run([helm, *command, *place, *wait], timeout=INSTALL_SECONDS + 30)
