"""A cluster in a directory: bring it up, use it, tear it down."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Self

from . import binaries, controlplane, processes
from .api import Api
from .components import Components
from .errors import CommandError, ComponentError, InvalidInputError, LocalkubeError
from .files import locked
from .kubeconfig import write_kubeconfig
from .layout import Layout
from .pki import Authority, Credential
from .record import Record

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

log = logging.getLogger(__name__)

DEFAULT_SERVICE_CIDR = "10.96.0.0/16"
API_SERVER_SECONDS = 60.0
CONTROLLERS_SECONDS = 60.0
COMMAND_SECONDS = 120.0
PORT_ATTEMPTS = 5


class Cluster:
    """A Kubernetes cluster whose files lie in `directory`.

    As a context manager it is up inside the block and torn down at its end:

        with Cluster(tmp_path).up(node=True) as cluster: ...

    An object made for the directory of a running cluster, in any process, works on that one.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._layout = Layout.of(directory)
        self._components = Components(self._layout)
        #: Seconds from the beginning of `up` to each milestone.
        self.timings: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self if self._record() else self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def directory(self) -> Path:
        """The cluster's directory."""
        return self._layout.root

    @property
    def kubeconfig(self) -> Path:
        """The kubeconfig of the administrator."""
        return self._layout.kubeconfig

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return self._running().server

    @property
    def authority(self) -> Path:
        """The certificate of the cluster's authority, PEM."""
        return self._layout.pki / "ca.crt"

    @property
    def admin(self) -> Credential:
        """The administrator's client certificate and key."""
        return Credential(self._layout.pki / "admin.crt", self._layout.pki / "admin.key")

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make kubectl, helm and clients use this cluster."""
        return {"KUBECONFIG": str(self.kubeconfig)}

    def up(self, *, node: bool = False, kwok: int = 0) -> Self:
        """Bring the cluster up and return it; a cluster that is up already is kept.

        With `node`, a real node (needs root); `kwok` is a number of simulated nodes.
        Returns once the API answers, the default ServiceAccount exists and the nodes are Ready.
        Raises LocalkubeError, and leaves nothing running, when that cannot be reached.
        """
        wanted = Record(node=node, kwok=kwok)
        self._layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._layout.lock):
            if present := self._record():
                self._check_same(present, wanted)
                return self
            try:
                self._start(wanted)
            except BaseException:
                self._tear_down()
                raise
        return self

    def down(self) -> None:
        """Tear the cluster down and delete its files but the logs; does nothing when it is down.

        Works from any process and after any crash. Raises TeardownError when something
        could not be removed.
        """
        if not self._layout.root.exists():
            return
        with locked(self._layout.lock):
            self._tear_down()

    def status(self) -> dict[str, int]:
        """Return the process ids of the components that run; empty when the cluster is down."""
        found = processes.find(self._layout.root)
        return {process.component: process.pid for process in sorted(found, key=lambda p: -p.pid)}

    def bin(self, name: str) -> Path:
        """Return the path of a binary such as kubectl or helm, built if need be."""
        return binaries.ensure([name])[name]

    def kubectl(
        self,
        *arguments: str,
        stdin: str | None = None,
        check: bool = True,
        timeout: float = COMMAND_SECONDS,
    ) -> str:
        """Run kubectl as administrator and return what it printed.

        Raises CommandError with its error output when it fails, unless `check` is false.
        """
        return self.run(
            [self.bin("kubectl"), *arguments], stdin=stdin, check=check, timeout=timeout
        )

    def run(
        self,
        command: Iterable[str | Path],
        *,
        stdin: str | None = None,
        check: bool = True,
        timeout: float = COMMAND_SECONDS,
    ) -> str:
        """Run a command with KUBECONFIG set and return its output; see `kubectl`."""
        argv = [os.fspath(part) for part in command]
        result = subprocess.run(
            argv,
            env={**os.environ, **self.environment},
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if check and result.returncode:
            raise CommandError(f"{' '.join(argv)}: status {result.returncode}: {result.stderr}")
        return result.stdout

    def kubeconfig_for(self, user: str, groups: Iterable[str] = ()) -> Path:
        """Write a kubeconfig for `user` in `groups`, who has the rights that RBAC gives, no more."""
        name = f"user-{user.replace(':', '-').replace('/', '-')}"
        authority = Authority(self._layout.pki)
        return write_kubeconfig(
            self._layout.config / f"{name}.kubeconfig",
            server=self.server,
            authority=authority.credential.certificate,
            credential=authority.issue(name, user, groups),
        )

    def _record(self) -> Record | None:
        return Record.load(self._layout.record)

    def _running(self) -> Record:
        record = self._record()
        if record is None:
            raise InvalidInputError(f"cluster {self._layout.root}: is not up; bring it up first")
        return record

    def _check_same(self, present: Record, wanted: Record) -> None:
        if (present.node, present.kwok) != (wanted.node, wanted.kwok):
            raise InvalidInputError(
                f"cluster {self._layout.root}: is up with node={present.node} kwok={present.kwok}, "
                f"asked for node={wanted.node} kwok={wanted.kwok}; tear it down first"
            )
        api = Api(present.server, self.authority, self.admin) if present.server else None
        if api is None or api.get("/readyz") is None:
            raise LocalkubeError(
                f"cluster {self._layout.root}: has a record but its API server does not answer; "
                "tear it down first"
            )

    def _start(self, wanted: Record) -> None:
        started = time.monotonic()
        paths = binaries.ensure(controlplane_binaries(wanted))
        shutil.rmtree(self._layout.logs, ignore_errors=True)
        wanted.save(self._layout.record)
        begun = time.monotonic()
        if begun - started > 1:
            log.info("binaries: ready after %.1f s", begun - started)

        def milestone(name: str) -> None:
            self.timings[name] = time.monotonic() - begun
            log.info("%s: ready after %.1f s", name, self.timings[name])

        self._start_control_plane(wanted, paths)
        milestone("API server")
        self._await_controllers()
        milestone("controllers")

    def _start_control_plane(self, wanted: Record, paths: dict[str, Path]) -> None:
        layout, start = self._layout, self._components.start
        start("etcd", controlplane.etcd(paths["etcd"], layout))
        address = "127.0.0.1"
        for attempt in range(1, PORT_ATTEMPTS + 1):
            endpoint = controlplane.Endpoint(
                address=address,
                port=controlplane.free_port(address),
                service_cidr=DEFAULT_SERVICE_CIDR,
                service_address="10.96.0.1",
                reachable_from_pods=False,
            )
            if attempt == 1:
                authority, admin = controlplane.prepare_pki(layout, endpoint)
            start(
                "kube-apiserver", controlplane.api_server(paths["kube-apiserver"], layout, endpoint)
            )
            api = Api(endpoint.server, authority.credential.certificate, admin)
            try:
                self._components.wait_for(
                    "waiting for the API server", lambda: api.get("/readyz"), API_SERVER_SECONDS
                )
                break
            except ComponentError:
                taken = "address already in use" in layout.log_tail("kube-apiserver")
                if not taken or attempt == PORT_ATTEMPTS:
                    raise
        dataclasses.replace(wanted, server=endpoint.server).save(layout.record)
        write_kubeconfig(
            layout.kubeconfig,
            server=endpoint.server,
            authority=authority.credential.certificate,
            credential=admin,
        )
        manager = controlplane.component_kubeconfig(
            layout, endpoint, authority, "system:kube-controller-manager"
        )
        start(
            "kube-controller-manager",
            controlplane.controller_manager(paths["kube-controller-manager"], layout, manager),
        )
        scheduler = controlplane.component_kubeconfig(
            layout, endpoint, authority, "system:kube-scheduler"
        )
        start("kube-scheduler", controlplane.scheduler(paths["kube-scheduler"], scheduler))

    def _await_controllers(self) -> None:
        api = Api(self.server, self.authority, self.admin)
        self._components.wait_for(
            "waiting for the default ServiceAccount",
            lambda: api.get("/api/v1/namespaces/default/serviceaccounts/default"),
            CONTROLLERS_SECONDS,
        )

    def _tear_down(self) -> None:
        processes.kill_all(self._layout.root)
        self._components.reap()
        self._layout.clear()


def controlplane_binaries(wanted: Record) -> tuple[str, ...]:
    """Return the names of the binaries that a cluster with these options needs."""
    return (
        *binaries.CONTROL_PLANE,
        *(binaries.NODE if wanted.node else ()),
        *(("kwok",) if wanted.kwok else ()),
    )
