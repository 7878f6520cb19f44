"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler: their command lines."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .files import write_private
from .pki import Authority, Credential, key_pem, new_key, public_pem

if TYPE_CHECKING:
    import ipaddress
    from collections.abc import Mapping
    from pathlib import Path

    from .layout import Layout

# Unix sockets in the cluster's directory (etcd insists on a port, which becomes part of the
# file's name): nothing to collide with, and out of reach of other users.
ETCD_CLIENTS = "unix://etcd-clients:0"
ETCD_PEERS = "unix://etcd-peers:0"

ADMINISTRATORS = "system:masters"


@dataclass(frozen=True)
class Endpoint:
    """Where the API server listens and what it hands out.

    `services` is the network of Service addresses, whose first one is its own. The server
    announces itself to pods only where `reachable_from_pods`.
    """

    address: str
    port: int
    services: ipaddress.IPv4Network
    reachable_from_pods: bool

    @property
    def server(self) -> str:
        """The URL of the API server."""
        return f"https://{self.address}:{self.port}"


def free_port(address: str) -> int:
    """Return a TCP port nobody listens on at `address`.

    It is taken from below the range that the kernel gives to outgoing connections, so that
    none of those gets it before the server does.
    """
    while True:
        port = random.randrange(20000, 32000)  # noqa: S311 - no secret
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port


def prepare_pki(layout: Layout, endpoint: Endpoint) -> tuple[Authority, Credential]:
    """Create the certificates of the control plane; return the authority and the admin's."""
    authority = Authority(layout.pki)
    names = ["kubernetes.default.svc.cluster.local", "kubernetes.default.svc"]
    names += ["kubernetes.default", "kubernetes", "localhost", "127.0.0.1"]
    names += [endpoint.address, str(endpoint.services[1])]
    authority.issue("apiserver", "kube-apiserver", hosts=names)
    authority.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", [ADMINISTRATORS])
    accounts = new_key()
    write_private(layout.pki / "service-accounts.key", key_pem(accounts))
    write_private(layout.pki / "service-accounts.pub", public_pem(accounts))
    return authority, authority.issue("admin", "kubernetes-admin", [ADMINISTRATORS])


def etcd(binary: Path, layout: Layout) -> list[str | Path]:
    """Return the command line of etcd; it loses data on power failure, for speed."""
    flags = {
        "name": "localkube",
        "data-dir": layout.etcd,
        "listen-client-urls": ETCD_CLIENTS,
        "advertise-client-urls": ETCD_CLIENTS,
        "listen-peer-urls": ETCD_PEERS,
        "initial-advertise-peer-urls": ETCD_PEERS,
        "initial-cluster": f"localkube={ETCD_PEERS}",
        "unsafe-no-fsync": "true",
    }
    return [binary, *_flags(flags)]


def api_server(
    binary: Path, layout: Layout, endpoint: Endpoint, more: Mapping[str, str]
) -> list[str | Path]:
    """Return the command line of kube-apiserver; flags in `more` replace those made here."""
    pki = layout.pki
    flags = {
        "etcd-servers": ETCD_CLIENTS,
        "bind-address": endpoint.address,
        "advertise-address": endpoint.address,
        "secure-port": endpoint.port,
        # A loopback address is refused as an endpoint, and nobody could use it.
        "endpoint-reconciler-type": "lease" if endpoint.reachable_from_pods else "none",
        "service-cluster-ip-range": endpoint.services,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        "client-ca-file": pki / "ca.crt",
        "tls-cert-file": pki / "apiserver.crt",
        "tls-private-key-file": pki / "apiserver.key",
        "kubelet-certificate-authority": pki / "ca.crt",
        "kubelet-client-certificate": pki / "apiserver-kubelet-client.crt",
        "kubelet-client-key": pki / "apiserver-kubelet-client.key",
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": pki / "service-accounts.pub",
        "service-account-signing-key-file": pki / "service-accounts.key",
    }
    return [binary, *_flags({**flags, **more})]


def controller_manager(
    binary: Path, layout: Layout, kubeconfig: Path, more: Mapping[str, str]
) -> list[str | Path]:
    """Return the command line of kube-controller-manager; it serves no port of its own.

    Flags in `more` replace those made here.
    """
    flags = {
        "kubeconfig": kubeconfig,
        "secure-port": 0,
        "leader-elect": "false",
        # Start-up creates some forty ServiceAccounts; the default of 20 requests/s shows.
        "kube-api-qps": 500,
        "kube-api-burst": 500,
        "use-service-account-credentials": "true",
        "service-account-private-key-file": layout.pki / "service-accounts.key",
        "root-ca-file": layout.pki / "ca.crt",
        # By default it creates a directory of its own below /usr.
        "flex-volume-plugin-dir": layout.config / "volume-plugins",
        "cluster-signing-cert-file": layout.pki / "ca.crt",
        "cluster-signing-key-file": layout.pki / "ca.key",
    }
    return [binary, *_flags({**flags, **more})]


def scheduler(binary: Path, kubeconfig: Path) -> list[str | Path]:
    """Return the command line of kube-scheduler; it serves no port of its own."""
    flags = {
        "kubeconfig": kubeconfig,
        "secure-port": 0,
        "leader-elect": "false",
        "kube-api-qps": 500,
        "kube-api-burst": 500,
    }
    return [binary, *_flags(flags)]


def _flags(values: Mapping[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]
