"""The programs that build images, and the choice among them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from workspace.errors import CommandError, MissingToolError, ToolError
from workspace.paths import ROOT
from workspace.process import run

if TYPE_CHECKING:
    from .images import Image

BUILD_SECONDS = 1800.0
ANSWER_SECONDS = 20.0
HOST_CERTIFICATES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
IMAGE_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


class Builder(Protocol):
    """Builds one image into an OCI or Docker archive."""

    @property
    def base(self) -> str:
        """The identity of the base image: part of each image's digest."""

    def build(self, image: Image, archive: Path) -> None:
        """Build `image` into the file `archive`; raises ToolError."""


class Daemon:
    """docker or podman: the base image comes from the registry that they know."""

    base = "python:3.11-slim-bookworm"

    def __init__(self, program: str) -> None:
        self._program = program

    def build(self, image: Image, archive: Path) -> None:
        """Build the image in the program's own store and save it."""
        source: list[str | Path] = ["--file", ROOT / image.dockerfile, ROOT]
        build = [self._program, "build", "--tag", image.reference, *source]
        run(build, timeout=BUILD_SECONDS)
        save: list[str | Path] = [self._program, "save", "--output", archive, image.reference]
        if self._program == "podman":  # docker's archives are OCI archives anyway
            save[2:2] = ["--format", "oci-archive"]
        run(save, timeout=BUILD_SECONDS)


def choose() -> Builder:
    """Return what builds images on this machine.

    $HEADRACE_IMAGE_BUILDER (docker, podman or buildah) decides, else the first that works.
    buildah starts from a Debian made here, so that it needs no registry; as root on a
    Debian-like system it is installed when it is missing. Raises MissingToolError.
    """
    from .debian import Buildah

    wanted = os.environ.get("HEADRACE_IMAGE_BUILDER")
    if wanted not in {None, "", "docker", "podman", "buildah"}:
        raise ToolError(
            f"HEADRACE_IMAGE_BUILDER: {wanted}: must be docker, podman or buildah, or unset"
        )
    for program in (wanted,) if wanted else ("docker", "podman"):
        if program in {"docker", "podman"} and _answers(program):
            return Daemon(program)
    if wanted in {"docker", "podman"}:
        raise MissingToolError(f"{wanted}: not installed, or its daemon does not answer")
    return Buildah.prepare()


def host_certificates() -> Path | None:
    """Return the bundle of certificate authorities that this machine was told to trust, if any."""
    for name in HOST_CERTIFICATES:
        if (value := os.environ.get(name)) and Path(value).is_file():
            return Path(value)
    return None


def _answers(program: str) -> bool:
    if shutil.which(program) is None:
        return False
    try:
        run([program, "info"], timeout=ANSWER_SECONDS)
    except CommandError:
        return False
    return True
