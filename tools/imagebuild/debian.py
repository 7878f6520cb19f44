"""buildah on a machine without a registry: the base image is a Debian made by debootstrap."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from workspace.errors import CommandError, MissingToolError
from workspace.paths import ROOT, cache_directory
from workspace.process import run

from .builders import BUILD_SECONDS, IMAGE_CERTIFICATES, host_certificates

if TYPE_CHECKING:
    from .images import Image

SUITE = "bookworm"
PACKAGES = ("ca-certificates", "python3", "python3-pip", "python3-venv")
NEEDED = {"buildah": "buildah", "debootstrap": "debootstrap"}  # program -> Debian package
KEYRING = "debian-archive-keyring"
SECONDS = 600.0


class Buildah:
    """buildah with a store of its own, run as root without user namespaces or a runtime."""

    def __init__(self, store: Path, driver: str) -> None:
        self._store = store
        self._command = ["buildah", "--root", f"{store}/root", "--runroot", f"{store}/run"]
        self._command += ["--storage-driver", driver]

    @classmethod
    def prepare(cls) -> Self:
        """Return a builder with nothing left over in its store; raises MissingToolError."""
        _install()
        store = cache_directory("buildah")
        builder = cls(store, _driver(store))
        builder._buildah("rm", "--all")  # of builds that were killed
        return builder

    @property
    def base(self) -> str:
        """The local base image, named after what it is made of."""
        recipe = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
        return f"localhost/headrace-base:{SUITE}-{recipe}"

    def build(self, image: Image, archive: Path) -> None:
        """Build the image straight into an archive: its layers enter no store."""
        self._ensure_base()
        downloads = _uv_cache()
        mounts = [f"{downloads}:/var/cache/uv"]
        if bundle := host_certificates():
            mounts.append(f"{bundle}:{IMAGE_CERTIFICATES}:ro")
        command = ["bud", "--isolation", "chroot", "--network", "host", "--pull-never"]
        command += ["--build-arg", f"BASE_IMAGE={self.base}"]
        command += ["--build-arg", f"BUILD_IMAGE={self.base}"]
        command += ["--build-arg", "UV_CACHE_DIR=/var/cache/uv"]
        command += [word for mount in mounts for word in ("--volume", mount)]
        command += ["--file", str(ROOT / image.dockerfile)]
        command += ["--tag", f"oci-archive:{archive}:{image.reference}", str(ROOT)]
        self._buildah(*command)

    def _ensure_base(self) -> None:
        if self.base in self._buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
            return
        container = self._buildah("from", "scratch").strip()
        try:
            root = Path(self._buildah("mount", container).strip())
            _debootstrap(root)
            self._buildah("commit", "--quiet", container, self.base)
        finally:
            self._buildah("rm", container)

    def _buildah(self, *arguments: str) -> str:
        with tempfile.TemporaryDirectory(dir=self._store) as scratch:
            environment = {"TMPDIR": scratch}
            return run([*self._command, *arguments], timeout=BUILD_SECONDS, env=environment)


def _install() -> None:
    packages = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if os.geteuid() != 0:
        raise MissingToolError(
            "images: neither docker nor podman works here, and buildah needs root; "
            "start one of the two, or run as root"
        )
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise MissingToolError(
            f"images: {', '.join(packages)} missing and apt-get too; install docker or podman"
        )
    run(["apt-get", "update", "-qq"], timeout=SECONDS)
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    run([*install, KEYRING, *packages], timeout=SECONDS, env=quiet)


def _driver(store: Path) -> str:
    """Return overlay where the kernel and the file system have it, else vfs, which copies."""
    with tempfile.TemporaryDirectory(dir=store) as trial:
        command = ["buildah", "--root", f"{trial}/root", "--runroot", f"{trial}/run"]
        try:
            run([*command, "--storage-driver", "overlay", "info"], timeout=SECONDS)
        except CommandError:
            return "vfs"
    return "overlay"


def _uv_cache() -> Path:
    """Return this machine's uv cache, where the same wheels mostly lie already; it is made."""
    directory = Path(os.environ.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _debootstrap(root: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE]
    run([*command, root], timeout=SECONDS)
    for folder in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
