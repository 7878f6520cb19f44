"""Bringing the real node up: its surroundings and containerd first, the rest with the API."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import archives, network, node
from .cgroups import ControlGroups
from .errors import ComponentError
from .images import Images, ImageStore
from .namespaces import Namespaces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .components import Components
    from .identities import Identities
    from .layout import Layout

log = logging.getLogger(__name__)

CONTAINERD_SECONDS = 30.0


class RealNode:
    """The node of the cluster in `layout`, made of the binaries at `paths`.

    `images` is the directory for its images, empty for one that goes with the cluster.
    """

    def __init__(
        self, layout: Layout, components: Components, paths: Mapping[str, Path], images: str
    ) -> None:
        self._layout = layout
        self._components = components
        self._paths = paths
        self._groups = ControlGroups(layout.group)
        self._groups.create()
        self._namespaces, self.store = self._create_namespaces(Path(images) if images else None)
        self.snapshotter = self._choose_snapshotter()
        self.addresses = network.connect(layout.identity, self._namespaces)
        self._start_containerd()

    def start(self, identities: Identities) -> None:
        """Start what needs the API server, and import the image of pod sandboxes."""
        name = node.NODE_NAME
        identities.authority.issue("kubelet-server", name, hosts=[name, self.addresses.node])
        kubelet = node.kubelet(
            self._paths["kubelet"],
            self._layout,
            self.addresses,
            self._groups.pods,
            identities.kubeconfig(f"system:node:{name}", ["system:nodes"]),
        )
        self._start("kubelet", kubelet)
        proxy = node.kube_proxy(
            self._paths["kube-proxy"],
            self._layout,
            self.addresses,
            identities.kubeconfig("system:kube-proxy"),
            bridge_filtered=self._namespaces.filters_bridges(),
        )
        self._start("kube-proxy", proxy)
        archive = self._layout.config / "pause.tar"
        archives.single_program_image(self._paths["pause"], node.SANDBOX_IMAGE, archive)
        socket = self._namespaces.seen(node.CONTAINERD_SOCKET)
        self._components.wait_for("waiting for containerd", socket.exists, CONTAINERD_SECONDS)
        Images(self._namespaces, self._paths["ctr"], self.store, self.snapshotter).add(archive)

    def _start(self, component: str, command: list[str | Path]) -> None:
        self._components.start(component, self._groups.enter(self._namespaces.enter(command)))

    def _create_namespaces(self, images: Path | None) -> tuple[Namespaces, ImageStore]:
        state = self._layout.node
        store, lock = open_store(images, state / "images")
        directories = {
            "/var/lib/containerd": store.containerd,
            "/var/lib/kubelet": state / "kubelet",
            "/var/lib/cni": state / "cni",
            "/var/log/pods": state / "pod-logs",
            "/var/log/containers": state / "container-logs",
        }
        try:
            # The namespaces hold the lock of the store from here on, as long as they exist.
            pause = self._paths["pause"]
            return Namespaces.create(self._components, pause, directories, [lock]), store
        finally:
            os.close(lock)

    def _choose_snapshotter(self) -> str:
        if self._namespaces.supports_overlay():
            return "overlayfs"
        log.warning(
            "%s cannot hold overlay mounts: images are copied whole, which takes more time and "
            "disk; choose a directory on ext4 or xfs",
            self.store.root,
        )
        return "native"

    def _start_containerd(self) -> None:
        node.pod_network(self._layout, self.addresses)
        shim = self._paths["containerd-shim-runc-v2"]
        command = node.containerd(self._paths["containerd"], self._layout, shim, self.snapshotter)
        self._start("containerd", command)


def open_store(shared: Path | None, private: Path) -> tuple[ImageStore, int]:
    """Return the shared store, or the private one where another cluster has it, and its lock."""
    if shared:
        store = ImageStore(shared)
        if (lock := store.acquire()) is not None:
            return store, lock
        log.warning("%s is in use by another cluster: starting without its images", shared)
    store = ImageStore(private)
    lock = store.acquire()
    if lock is None:
        raise ComponentError(f"{private}: is in use by another cluster; tear that down first")
    return store, lock
