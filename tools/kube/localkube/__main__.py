"""The command line: python -m localkube COMMAND."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from typing import TYPE_CHECKING

from . import binaries, prerequisites, processes
from .cluster import Cluster
from .errors import LocalkubeError
from .modules import MODULES

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 with the reason on standard error."""
    logging.basicConfig(level=logging.INFO, format="localkube: %(message)s", stream=sys.stderr)
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (LocalkubeError, OSError) as error:
        print(f"localkube: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="localkube", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="bring a cluster up and print its environment")
    up.add_argument("--node", action="store_true", help="with a real node (needs root)")
    up.add_argument("--kwok", type=_count, default=0, metavar="N", help="add N simulated nodes")
    up.add_argument("--kwok-stages", default="", metavar="FILE", help="Stages to use for them")
    up.add_argument("--images", default="", metavar="DIR", help="where images outlive the cluster")
    up.add_argument(
        "--api-server",
        type=_flag,
        action="append",
        default=[],
        metavar="FLAG=VALUE",
        help="a flag of the API server, such as audit-log-path=FILE",
    )
    up.set_defaults(run=_up)
    down = commands.add_parser("down", help="tear a cluster down, also after a crash")
    down.set_defaults(run=lambda options: Cluster(options.dir).down())
    status = commands.add_parser("status", help="list what runs; status 3 when nothing does")
    status.set_defaults(run=_status)
    environment = commands.add_parser("env", help="print the environment for a shell to evaluate")
    environment.set_defaults(run=_environment)
    kubectl = commands.add_parser("kubectl", help="run kubectl as administrator")
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    kubectl.set_defaults(run=_kubectl)
    image = commands.add_parser("image-import", help="import image archives into the real node")
    image.add_argument("archives", nargs="+", metavar="ARCHIVE")
    image.set_defaults(run=_import_images)
    ctr = commands.add_parser("ctr", help="run containerd's ctr in the real node")
    ctr.add_argument("arguments", nargs=argparse.REMAINDER)
    ctr.set_defaults(run=_ctr)
    guard = commands.add_parser("guard", help="tear the cluster down at the end of standard input")
    guard.set_defaults(run=_guard)
    for command in (up, down, status, environment, kubectl, image, ctr, guard):
        command.add_argument("--dir", required=True, help="the cluster's directory")

    listing = commands.add_parser("list", help="print the directories of all running clusters")
    listing.set_defaults(run=_list)
    packages = commands.add_parser("install-packages", help="install what a real node needs")
    packages.set_defaults(run=_install_packages)
    build = commands.add_parser("build", help="build binaries into the cache ahead of their use")
    build.add_argument("--all", action="store_true", help="node, kwok and helm as well")
    build.add_argument(
        "binaries", nargs="*", metavar="BINARY", help="these alone (default: the control plane's)"
    )
    build.set_defaults(run=_build)
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: must be 0 or more")
    return value


def _flag(text: str) -> tuple[str, str]:
    name, equals, value = text.removeprefix("--").partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text}: must be FLAG=VALUE")
    return name, value


def _up(options: argparse.Namespace) -> None:
    cluster = Cluster(options.dir).up(
        node=options.node,
        kwok=options.kwok,
        kwok_stages=options.kwok_stages,
        images=options.images,
        api_server=dict(options.api_server),
    )
    _print_environment(cluster)


def _environment(options: argparse.Namespace) -> None:
    cluster = Cluster(options.dir)
    _ = cluster.server  # refuses a cluster that is not up
    _print_environment(cluster)


def _print_environment(cluster: Cluster) -> None:
    for name, value in cluster.environment.items():
        print(f"export {name}={shlex.quote(value)}")


def _status(options: argparse.Namespace) -> int:
    running = Cluster(options.dir).status()
    for component, pid in running.items():
        print(f"{component} {pid}")
    return 0 if running else 3


def _list(_: argparse.Namespace) -> None:
    for directory in sorted(processes.owners()):
        print(directory)


def _kubectl(options: argparse.Namespace) -> None:
    cluster = Cluster(options.dir)
    kubectl = cluster.bin("kubectl")
    _ = cluster.server
    os.execve(  # noqa: S606 - kubectl takes over the terminal
        kubectl, ["kubectl", *options.arguments], {**os.environ, **cluster.environment}
    )


def _guard(options: argparse.Namespace) -> None:
    sys.stdin.read()
    Cluster(options.dir).down()


def _import_images(options: argparse.Namespace) -> None:
    cluster = Cluster(options.dir)
    for archive in options.archives:
        for name in cluster.import_image(archive):
            print(name)


def _ctr(options: argparse.Namespace) -> None:
    print(Cluster(options.dir).ctr(*options.arguments), end="")


def _install_packages(_: argparse.Namespace) -> None:
    installed = prerequisites.install_packages()
    print(f"installed: {' '.join(installed)}" if installed else "nothing is missing")


def _build(options: argparse.Namespace) -> None:
    everything = [name for one in MODULES if not one.optional for name in one.commands]
    wanted = options.binaries or binaries.CONTROL_PLANE
    paths = binaries.ensure(everything if options.all else wanted)
    for name, path in paths.items():
        print(f"{name} {path}")


if __name__ == "__main__":
    sys.exit(main())
