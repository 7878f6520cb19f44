"""The pinned Go modules: which binaries each one yields and how its versions are stamped."""

from __future__ import annotations

import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InvalidInputError
from .files import cache_root

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def _modules_directory() -> Path:
    package = Path(__file__).parent
    installed = package / "modules"
    return installed if installed.is_dir() else package.parent / "modules"


@dataclass(frozen=True)
class Module:
    """A directory with go.mod and go.sum that pins the sources of some binaries.

    `commands` maps a binary's name to its Go package. `pin` is the required module whose
    version is stamped into `stamps`: linker variables, with {version}, {major} and {minor}.
    `tags` are Go's build tags. What is `optional` takes minutes and is needed by few: `build --all`
    leaves it out.
    """

    name: str
    commands: Mapping[str, str]
    pin: str = ""
    stamps: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    optional: bool = False

    @property
    def directory(self) -> Path:
        """Where go.mod and go.sum lie."""
        return _modules_directory() / self.name

    @property
    def go_version(self) -> str:
        """The lowest Go version that builds the module."""
        return self._find(r"^go (\S+)$")

    @property
    def linker_flags(self) -> str:
        """The value of `go build -ldflags`."""
        version = self._find(rf"^\s*(?:require )?{re.escape(self.pin)} (v\S+)") if self.pin else ""
        major, minor, *_ = [*version.removeprefix("v").split("."), "", ""]
        stamps = [s.format(version=version, major=major, minor=minor) for s in self.stamps]
        return " ".join(["-s -w", *(f"-X {stamp}" for stamp in stamps)])

    @property
    def cache_directory(self) -> Path:
        """Where the built binaries lie: named by everything that decides their content."""
        digest = hashlib.sha256(
            " ".join([platform.machine(), self.linker_flags, *self.tags]).encode()
        )
        for source in sorted(self.directory.iterdir()):
            digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
        return cache_root() / "kube" / f"{self.name}-{digest.hexdigest()[:16]}"

    def _find(self, pattern: str) -> str:
        match = re.search(pattern, (self.directory / "go.mod").read_text(), re.MULTILINE)
        if not match:
            raise InvalidInputError(f"{self.directory}/go.mod has no line matching {pattern!r}")
        return match.group(1)


def _kubernetes_stamps() -> tuple[str, ...]:
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    fields = ("gitVersion={version}", "gitMajor={major}", "gitMinor={minor}")
    return tuple(f"{package}.{field}" for package in packages for field in fields)


def _commands(package: str, names: Iterable[str]) -> dict[str, str]:
    return {name: f"{package}/{name}" for name in names}


MODULES = (
    Module("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}),
    Module(
        "kubernetes",
        _commands(
            "k8s.io/kubernetes/cmd",
            (
                "kube-apiserver",
                "kube-controller-manager",
                "kube-scheduler",
                "kubectl",
                "kubelet",
                "kube-proxy",
            ),
        ),
        pin="k8s.io/kubernetes",
        stamps=_kubernetes_stamps(),
    ),
    Module(
        "containerd",
        _commands(
            "github.com/containerd/containerd/v2/cmd",
            ("containerd", "containerd-shim-runc-v2", "ctr"),
        ),
        pin="github.com/containerd/containerd/v2",
        stamps=("github.com/containerd/containerd/v2/version.Version={version}",),
    ),
    Module("pause", {"pause": "headrace.dev/tools/kube/pause"}),
    Module(
        "kwok",
        {"kwok": "sigs.k8s.io/kwok/cmd/kwok"},
        pin="sigs.k8s.io/kwok",
        stamps=("sigs.k8s.io/kwok/pkg/consts.Version={version}",),
    ),
    Module(
        "helm",
        {"helm": "helm.sh/helm/v4/cmd/helm"},
        pin="helm.sh/helm/v4",
        stamps=("helm.sh/helm/v4/internal/version.version={version}",),
    ),
    Module(
        "fsx",
        {
            "csi-provisioner": (
                "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"
            ),
            "fake-fsx-driver": "headrace.dev/tools/kube/fake-fsx-driver",
        },
    ),
    Module("dra", {"fake-gpu-driver": "headrace.dev/tools/kube/fake-gpu-driver"}),
    Module("lws", {"lws-manager": "sigs.k8s.io/lws/cmd"}),
    Module("peer", {"peer": "headrace.dev/tools/kube/peer"}, optional=True),
    Module("versitygw", {"versitygw": "github.com/versity/versitygw/cmd/versitygw"}),
    Module(
        "prometheus",
        _commands("github.com/prometheus/prometheus/cmd", ("prometheus", "promtool")),
        pin="github.com/prometheus/prometheus",
        stamps=("github.com/prometheus/common/version.Version={version}",),
        tags=("remove_all_sd", "enable_kubernetes_sd"),
        optional=True,
    ),
)


def module_of(binary: str) -> Module:
    """Return the module that yields `binary`; raises InvalidInputError when none does."""
    for module in MODULES:
        if binary in module.commands:
            return module
    known = sorted(name for module in MODULES for name in module.commands)
    raise InvalidInputError(f"binary {binary!r} is not one of {', '.join(known)}")
