"""Bringing a cluster up, step by step, each waited for."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import binaries, controlplane, kwok, node, prerequisites
from .api import Api
from .errors import ComponentError, InvalidInputError, LocalkubeError
from .identities import Identities
from .kubeconfig import write_kubeconfig
from .realnode import RealNode

if TYPE_CHECKING:
    from .components import Components
    from .layout import Layout
    from .network import Addresses
    from .pki import Credential
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
        node_part = self._prepare_node() if self._record.node else None
        self._start_control_plane(node_part.addresses if node_part else None)
        self._milestone("API server")
        self._start_controllers()
        if node_part:
            node_part.start(self._identities)
        if self._record.kwok:
            self._start_kwok()
        self._wait("default ServiceAccount", "/api/v1/namespaces/default/serviceaccounts/default")
        self._milestone("controllers")
        if node_part:
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

    def _prepare_node(self) -> RealNode:
        prepared = RealNode(self._layout, self._components, self._paths, self._record.images)
        self._record = dataclasses.replace(
            self._record, images=str(prepared.store.root), snapshotter=prepared.snapshotter
        )
        return prepared

    def _start_control_plane(self, addresses: Addresses | None) -> None:
        self._components.start("etcd", controlplane.etcd(self._paths["etcd"], self._layout))
        endpoint = controlplane.Endpoint(
            address=addresses.host if addresses else LOOPBACK,
            port=0,
            services=addresses.services if addresses else UNROUTED_SERVICES,
            reachable_from_pods=addresses is not None,
        )
        authority, admin = controlplane.prepare_pki(self._layout, endpoint)
        self._start_api_server(endpoint, authority.credential.certificate, admin)
        self._identities = Identities(self._layout, authority, self._record.server)
        write_kubeconfig(
            self._layout.kubeconfig,
            server=self._record.server,
            authority=authority.credential.certificate,
            credential=admin,
        )

    def _start_api_server(
        self, endpoint: controlplane.Endpoint, authority: Path, admin: Credential
    ) -> None:
        """Start the API server on a free port; on another one if somebody was faster."""
        for attempts_left in reversed(range(PORT_ATTEMPTS)):
            port = controlplane.free_port(endpoint.address)
            endpoint = dataclasses.replace(endpoint, port=port)
            command = controlplane.api_server(
                self._paths["kube-apiserver"], self._layout, endpoint, self._record.api_server
            )
            self._components.start("kube-apiserver", command)
            self._record = dataclasses.replace(self._record, server=endpoint.server)
            self._api = Api(endpoint.server, authority, admin)
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
                self._identities.kubeconfig("system:kube-controller-manager"),
                self._record.controller_manager,
            ),
        )
        self._components.start(
            "kube-scheduler",
            controlplane.scheduler(
                self._paths["kube-scheduler"], self._identities.kubeconfig("system:kube-scheduler")
            ),
        )

    def _start_kwok(self) -> None:
        stages = Path(self._record.kwok_stages or kwok.DEFAULT_STAGES)
        kubeconfig = self._identities.kubeconfig("kwok", [controlplane.ADMINISTRATORS])
        self._components.start("kwok", kwok.command(self._paths["kwok"], kubeconfig, stages))
        for number in range(self._record.kwok):
            manifest = kwok.node_manifest(f"kwok-{number}")
            status, answer = self._api.request("POST", "/api/v1/nodes", manifest)
            if status != 201:
                raise LocalkubeError(f"creating kwok-{number}: status {status}: {answer}")

    def _kwok_ready(self, nodes: dict[str, list[dict[str, object]]]) -> bool:
        return sum(map(node.is_ready, nodes["items"])) >= self._record.kwok
