"""Bringing a cluster up, step by step, each waited for."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import archives, binaries, controlplane, kwok, network, node, prerequisites
from .api import Api
from .cgroups import ControlGroups
from .errors import ComponentError, InvalidInputError, LocalkubeError
from .images import Images, ImageStore
from .kubeconfig import write_kubeconfig
from .namespaces import Namespaces

if TYPE_CHECKING:
    from .components import Components
    from .layout import Layout
    from .record import Record

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
# Nothing routes these: they are for a control plane alone, which has no pods to use them.
UNROUTED_SERVICES = ipaddress.IPv4Network("10.96.0.0/16")
READY_SECONDS = 60.0
PORT_ATTEMPTS = 5


def needed_binaries(wanted: Record) -> tuple[str, ...]:
    """Return the names of the binaries that a cluster with these options needs."""
    return (
        *binaries.CONTROL_PLANE,
        *(binaries.NODE if wanted.node else ()),
        *(("kwok",) if wanted.kwok else ()),
    )


class Startup:
    """One attempt to bring up the cluster in `layout` as `wanted`.

    `timings` receives the seconds from the start of the first component to each milestone.
    """

    def __init__(
        self, layout: Layout, components: Components, wanted: Record, timings: dict[str, float]
    ) -> None:
        self._layout = layout
        self._components = components
        self._record = wanted
        self._timings = timings
        self._groups = ControlGroups(layout.group)

    def check(self) -> None:
        """Raise LocalkubeError when the cluster cannot come up here; starts nothing."""
        if self._record.node:
            prerequisites.check_node()
            if self._layout.root.is_relative_to("/run"):
                raise InvalidInputError(
                    f"cluster directory {self._layout.root}: a node has a /run of its own and "
                    "cannot see it; choose a directory that is not below /run"
                )

    def run(self) -> None:
        """Bring the cluster up; raises LocalkubeError where that fails."""
        self._paths = binaries.ensure(needed_binaries(self._record))
        self._begun = time.monotonic()
        self._record.save(self._layout.record)
        if self._record.node:
            self._create_node_environment()
        self._start_control_plane()
        self._milestone("API server")
        self._start_controllers()
        if self._record.node:
            self._start_node()
        if self._record.kwok:
            self._start_kwok()
        self._wait("default ServiceAccount", "/api/v1/namespaces/default/serviceaccounts/default")
        self._milestone("controllers")
        if self._record.node:
            self._wait("node", f"/api/v1/nodes/{node.NODE_NAME}", node.is_ready)
            self._milestone("node")
        if self._record.kwok:
            self._wait("simulated nodes", "/api/v1/nodes?labelSelector=type=kwok", self._kwok_ready)
            self._milestone("simulated nodes")

    def _milestone(self, name: str) -> None:
        self._timings[name] = time.monotonic() - self._begun
        log.info("%s: ready after %.1f s", name, self._timings[name])

    def _wait(self, what: str, path: str, ready: node.Predicate = bool) -> None:
        self._components.wait_for(
            f"waiting for {what}",
            lambda: (answer := self._api.get(path)) is not None and ready(answer),
            READY_SECONDS,
        )

    # Control plane

    def _start_control_plane(self) -> None:
        self._components.start("etcd", controlplane.etcd(self._paths["etcd"], self._layout))
        endpoint = controlplane.Endpoint(
            address=self._addresses.host if self._record.node else LOOPBACK,
            port=0,
            services=self._addresses.services if self._record.node else UNROUTED_SERVICES,
            reachable_from_pods=self._record.node,
        )
        self._authority, self._admin = controlplane.prepare_pki(self._layout, endpoint)
        self._start_api_server(endpoint)
        write_kubeconfig(
            self._layout.kubeconfig,
            server=self._record.server,
            authority=self._authority.credential.certificate,
            credential=self._admin,
        )

    def _start_api_server(self, endpoint: controlplane.Endpoint) -> None:
        """Start the API server on a free port; on another one if somebody was faster."""
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            port = controlplane.free_port(endpoint.address)
            endpoint = dataclasses.replace(endpoint, port=port)
            command = controlplane.api_server(self._paths["kube-apiserver"], self._layout, endpoint)
            self._components.start("kube-apiserver", command)
            self._record = dataclasses.replace(self._record, server=endpoint.server)
            self._api = Api(endpoint.server, self._authority.credential.certificate, self._admin)
            try:
                self._wait("the API server", "/readyz")
            except ComponentError as error:
                if "address already in use" not in str(error) or not attempts_left:
                    raise
            else:
                self._record.save(self._layout.record)
                return

    def _start_controllers(self) -> None:
        self._components.start(
            "kube-controller-manager",
            controlplane.controller_manager(
                self._paths["kube-controller-manager"],
                self._layout,
                self._kubeconfig("system:kube-controller-manager"),
            ),
        )
        self._components.start(
            "kube-scheduler",
            controlplane.scheduler(
                self._paths["kube-scheduler"], self._kubeconfig("system:kube-scheduler")
            ),
        )

    def _kubeconfig(self, user: str, *groups: str) -> Path:
        name = user.replace(":", "-")
        return write_kubeconfig(
            self._layout.config / f"{name}.kubeconfig",
            server=self._record.server,
            authority=self._authority.credential.certificate,
            credential=self._authority.issue(name, user, groups),
        )

    # Real node

    def _create_node_environment(self) -> None:
        """Make what surrounds the node's processes, and start the one that needs no API."""
        self._groups.create()
        self._create_namespaces()
        self._addresses = network.connect(self._layout.identity, self._namespaces)
        node.pod_network(self._layout, self._addresses)
        shim = self._paths["containerd-shim-runc-v2"]
        self._start_in_node(
            "containerd",
            node.containerd(
                self._paths["containerd"], self._layout, shim, self._record.snapshotter
            ),
        )

    def _create_namespaces(self) -> None:
        state = self._layout.node
        store = ImageStore(Path(self._record.images) if self._record.images else state / "images")
        lock = store.acquire()
        if lock is None:
            log.warning("%s is in use by another cluster: starting without images", store.root)
            store = ImageStore(state / "images")
            lock = store.acquire()
        directories = {
            "/var/lib/containerd": store.containerd,
            "/var/lib/kubelet": state / "kubelet",
            "/var/lib/cni": state / "cni",
            "/var/log/pods": state / "pod-logs",
            "/var/log/containers": state / "container-logs",
        }
        held = () if lock is None else (lock,)
        try:
            self._namespaces = Namespaces.create(
                self._components, self._paths["pause"], directories, held
            )
        finally:
            for descriptor in held:
                os.close(descriptor)
        snapshotter = "overlayfs"
        if not self._namespaces.supports_overlay():
            snapshotter = "native"
            log.warning(
                "%s cannot hold overlay mounts: images are copied whole, which takes more time "
                "and disk; choose a directory on ext4 or xfs",
                store.root,
            )
        self._record = dataclasses.replace(
            self._record, images=str(store.root), snapshotter=snapshotter
        )

    def _start_in_node(self, component: str, command: list[str | Path]) -> None:
        self._components.start(component, self._groups.enter(self._namespaces.enter(command)))

    def _start_node(self) -> None:
        name = node.NODE_NAME
        self._authority.issue("kubelet-server", name, hosts=[name, self._addresses.node])
        self._start_in_node(
            "kubelet",
            node.kubelet(
                self._paths["kubelet"],
                self._layout,
                self._addresses,
                self._groups.pods,
                self._kubeconfig(f"system:node:{name}", "system:nodes"),
            ),
        )
        self._start_in_node(
            "kube-proxy",
            node.kube_proxy(
                self._paths["kube-proxy"],
                self._layout,
                self._addresses,
                self._kubeconfig("system:kube-proxy"),
                bridge_filtered=self._namespaces.filters_bridges(),
            ),
        )
        self._import_sandbox_image()

    def _import_sandbox_image(self) -> None:
        self._components.wait_for(
            "waiting for containerd", self._namespaces.seen(node.CONTAINERD_SOCKET).exists, 30
        )
        archive = self._layout.config / "pause.tar"
        archives.single_program_image(self._paths["pause"], node.SANDBOX_IMAGE, archive)
        Images(self._namespaces, self._paths["ctr"], self._record).add(archive)

    # Simulated nodes

    def _start_kwok(self) -> None:
        stages = Path(self._record.kwok_stages or kwok.DEFAULT_STAGES)
        kubeconfig = self._kubeconfig("kwok", controlplane.ADMINISTRATORS)
        self._components.start("kwok", kwok.command(self._paths["kwok"], kubeconfig, stages))
        for number in range(self._record.kwok):
            manifest = kwok.node_manifest(f"kwok-{number}")
            status, answer = self._api.request("POST", "/api/v1/nodes", manifest)
            if status != 201:
                raise LocalkubeError(f"creating kwok-{number}: status {status}: {answer}")

    def _kwok_ready(self, nodes: dict[str, list[dict[str, object]]]) -> bool:
        return sum(map(node.is_ready, nodes["items"])) >= self._record.kwok
