"""The network of a real node: a veth pair to a network namespace, and addresses for it.

Each node cluster gets a /16: addresses of the link at its start, pods in its second quarter,
services in its third. What is in use shows in the machine's own routes, so there is no list
of allocations that a crash could leave wrong.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import CommandError, PrerequisiteError
from .files import locked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .namespaces import Namespaces

BLOCKS = tuple(ipaddress.IPv4Network("10.128.0.0/9").subnets(new_prefix=16))
ALLOCATION_LOCK = Path("/run/localkube.lock")
COMMAND_SECONDS = 30


@dataclass(frozen=True)
class Addresses:
    """The addresses of one node cluster, all from `block`, a /16."""

    block: ipaddress.IPv4Network

    @property
    def host(self) -> str:
        """The machine's end of the link: the API server listens here."""
        return str(self.block[1])

    @property
    def node(self) -> str:
        """The node's end of the link."""
        return str(self.block[2])

    @property
    def pods(self) -> ipaddress.IPv4Network:
        """The network of the pods."""
        return list(self.block.subnets(prefixlen_diff=2))[1]

    @property
    def services(self) -> ipaddress.IPv4Network:
        """The network of Service addresses."""
        return list(self.block.subnets(prefixlen_diff=2))[2]


def interface_name(identity: str) -> str:
    """Return the name of the machine's end of the link."""
    return f"lk{identity}"


def connect(identity: str, namespaces: Namespaces) -> Addresses:
    """Link the node's network namespace to the machine and route pods and services to it.

    Raises PrerequisiteError when no block of addresses is free.
    """
    link = interface_name(identity)
    with locked(ALLOCATION_LOCK):
        addresses = Addresses(_free_block())
        peer = ["peer", "name", "eth0", "netns", str(namespaces.pid)]
        _ip("link", "add", link, "type", "veth", *peer)
        # From here on the block shows in the routes, also to those waiting for the lock.
        _ip("address", "add", f"{addresses.host}/30", "dev", link)
        _ip("link", "set", link, "up")
    for arguments in (
        ("link", "set", "lo", "up"),
        ("address", "add", f"{addresses.node}/30", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("route", "add", "default", "via", addresses.host),
    ):
        namespaces.run("ip", *arguments)
    for destination in (addresses.pods, addresses.services):
        _ip("route", "add", str(destination), "via", addresses.node, "dev", link)
    return addresses


def disconnect(identity: str) -> None:
    """Delete the link, and with it its routes; does nothing when it is gone."""
    link = interface_name(identity)
    if Path("/sys/class/net", link).exists():
        # The namespace's end takes this one with it, perhaps at this very moment.
        _ip("link", "delete", link, check=False)


def _free_block() -> ipaddress.IPv4Network:
    used = list(_used_networks())
    for block in BLOCKS:
        if not any(block.overlaps(network) for network in used):
            return block
    raise PrerequisiteError("no /16 below 10.128.0.0/9 is free for a node; tear a cluster down")


def _used_networks() -> Iterator[ipaddress.IPv4Network]:
    for route in json.loads(_ip("-json", "-4", "route", "show", "table", "all")):
        if route["dst"] != "default":
            yield ipaddress.IPv4Network(route["dst"], strict=False)


def _ip(*arguments: str, check: bool = True) -> str:
    result = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
    )
    if check and result.returncode:
        raise CommandError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout
