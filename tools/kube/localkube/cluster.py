"""A cluster in a directory: bring it up, use it, tear it down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Self

from . import binaries, network, processes
from .api import Api
from .cgroups import ControlGroups
from .components import Components
from .errors import CommandError, InvalidInputError, LocalkubeError
from .files import locked
from .guard import Guard
from .identities import Identities
from .images import NAMESPACE, Images, ImageStore
from .kubeconfig import write_kubeconfig
from .layout import Layout
from .namespaces import Namespaces
from .pki import Authority, Credential
from .record import Record
from .startup import Startup

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

COMMAND_SECONDS = 120.0
RESTART_SECONDS = 60.0


class Cluster:
    """A Kubernetes cluster whose files lie in `directory`.

    As a context manager it is up inside the block and torn down at its end, even if this
    Python process is killed:

        with Cluster(tmp_path).up(node=True) as cluster: ...

    An object made for the directory of a running cluster, in any process, works on that one.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._layout = Layout.of(directory)
        self._components = Components(self._layout)
        #: Seconds from the start of the first component to each milestone of `up`.
        self.timings: dict[str, float] = {}

    def __enter__(self) -> Self:
        if not self._record():
            self.up()
        self._guard = Guard(self._layout.root)
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._guard.dismiss()

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

    def up(
        self,
        *,
        node: bool = False,
        kwok: int = 0,
        kwok_stages: str | os.PathLike[str] = "",
        images: str | os.PathLike[str] = "",
        api_server: Mapping[str, str] | None = None,
        controller_manager: Mapping[str, str] | None = None,
    ) -> Self:
        """Bring the cluster up and return it; a cluster that is up already is kept.

        With `node`, a real node (needs root). `kwok` is a number of simulated nodes, and
        `kwok_stages` a file of Stage objects to use instead of kwok's own fast ones. `images`
        is a directory for the real node's images that outlives the cluster: a later one finds
        them there. While another cluster uses it, the node starts without them. `api_server` has
        more flags of the API server by name, without dashes, or other values of those it has,
        and `controller_manager` those of kube-controller-manager.
        Returns once the API answers, the default ServiceAccount exists and the nodes are Ready.
        Raises LocalkubeError, and leaves nothing running, when that cannot be reached.
        """
        wanted = Record(
            node=node,
            kwok=kwok,
            kwok_stages=_absolute(kwok_stages),
            images=_absolute(images),
            api_server=dict(api_server or {}),
            controller_manager=dict(controller_manager or {}),
        )
        startup = Startup(self._layout, self._components, wanted, self.timings)
        startup.check()
        self._layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(self._layout.lock):
            if present := self._record():
                self._check_same(present, wanted)
                return self
            shutil.rmtree(self._layout.logs, ignore_errors=True)
            try:
                startup.run()
            except BaseException:
                self._tear_down()
                raise
        return self

    def down(self) -> None:
        """Tear the cluster down and delete its files but the logs; does nothing when it is down.

        Works from any process and after any crash. Raises TeardownError when something could
        not be removed.
        """
        if not self._layout.root.exists():
            return
        with locked(self._layout.lock):
            self._tear_down()

    def status(self) -> dict[str, int]:
        """Return the process ids of the components that run; empty when the cluster is down."""
        found = processes.find(self._layout.root)
        return {process.component: process.pid for process in sorted(found, key=lambda p: -p.pid)}

    def kill(self, component: str) -> Sequence[str]:
        """Kill a component of the control plane, as a crash would; return its command line."""
        pid = self.status()[component]
        command = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        os.kill(pid, signal.SIGKILL)
        self._components.forget(component)
        return command

    def start(self, component: str, command: Sequence[str]) -> None:
        """Start a component again that was killed; wait until the API server answers."""
        self._components.start(component, command)
        api = Api(self.server, self.authority, self.admin)
        self._components.wait_for(
            f"restarting {component}", lambda: api.get("/readyz") is not None, RESTART_SECONDS
        )

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
        command: list[str | Path] = [self.bin("kubectl"), *arguments]
        return self.run(command, stdin=stdin, check=check, timeout=timeout)

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

    def kubeconfig_for(self, user: str, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig for `user` in `groups`, with the rights that RBAC gives them."""
        server = self.server
        identities = Identities(self._layout, Authority(self._layout.pki), server)
        return identities.kubeconfig(user, groups, prefix="user-")

    def kubeconfig_of(
        self, account: str, namespace: str, path: Path, *, duration: str = "1h"
    ) -> Path:
        """Write a kubeconfig with a token of a ServiceAccount that ends after `duration`."""
        name = ("create", "token", account, f"--namespace={namespace}")
        token = self.kubectl(*name, f"--duration={duration}").strip()
        return write_kubeconfig(
            path, server=self.server, authority=self.authority, credential=token
        )

    def run_in_node(
        self, *command: str | Path, check: bool = True, timeout: float = COMMAND_SECONDS
    ) -> str:
        """Run a command in the real node's network, mounts and process ids; return its output.

        What it mounts, pods see, the machine does not, and `down` takes away.
        """
        namespaces = Namespaces.find(self._layout.root)
        return namespaces.run(*command, check=check, timeout=timeout)

    def start_in_node(self, component: str, command: Sequence[str | Path]) -> None:
        """Start a process in the real node, with a log of its own; `down` ends it.

        It is given no environment but what components have; KUBECONFIG is not in it.
        """
        self._components.start(component, Namespaces.find(self._layout.root).enter(command))

    def ctr(self, *arguments: str, check: bool = True, timeout: float = COMMAND_SECONDS) -> str:
        """Run containerd's ctr on the images and containers of the real node's pods."""
        flag = f"--namespace={NAMESPACE}"
        return self.run_in_node(self.bin("ctr"), flag, *arguments, check=check, timeout=timeout)

    def import_image(self, archive: str | os.PathLike[str]) -> list[str]:
        """Import an OCI or Docker archive into the real node; return the names of its images.

        An unchanged archive that the node has already is not imported again.
        """
        namespaces = Namespaces.find(self._layout.root)
        record = self._running()
        store = ImageStore(Path(record.images))
        images = Images(namespaces, self.bin("ctr"), store, record.snapshotter)
        return images.add(Path(archive).resolve(strict=True))

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

    def _tear_down(self) -> None:
        processes.kill_all(self._layout.root)
        self._components.reap()
        ControlGroups(self._layout.group).remove()
        network.disconnect(self._layout.identity)
        self._layout.clear()


def _absolute(path: str | os.PathLike[str]) -> str:
    return str(Path(path).resolve()) if os.fspath(path) else ""
