"""The images, and the digest of what each is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workspace.errors import ToolError
from workspace.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image: its Dockerfile and the files and folders of the repository that it copies."""

    name: str
    dockerfile: str
    inputs: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The name that manifests use."""
        return f"localhost/{self.name}:dev"

    def digest(self, *, base: str) -> str:
        """Return a digest of the inputs and of the base image's identity, 16 hex digits."""
        digest = hashlib.sha256(f"{self.reference}\n{base}\n".encode())
        for path in self._files():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(ROOT)} {content}\n".encode())
        return digest.hexdigest()[:16]

    def _files(self) -> Iterator[Path]:
        for name in (self.dockerfile, ".dockerignore", *self.inputs):
            path = ROOT / name
            if not path.exists():
                raise ToolError(f"image {self.name}: {name} is missing in {ROOT}")
            yield from sorted(_sources(path)) if path.is_dir() else [path]


def _sources(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        ignored = any(part == "__pycache__" or part.endswith(".egg-info") for part in path.parts)
        if path.is_file() and not ignored:
            yield path


IMAGES = {
    image.name: image
    for image in (
        Image(
            name="headrace-operator",
            dockerfile="Dockerfile",
            inputs=("requirements/build.txt", "requirements/operator.txt", "operator"),
        ),
        Image(
            name="headrace-loader",
            dockerfile="loader_image/Dockerfile",
            inputs=("requirements/build.txt", "requirements/loader.txt", "loader_image"),
        ),
        Image(
            name="engine-cpu",
            dockerfile="tools/images/engine-cpu/Dockerfile",
            inputs=("requirements/build.txt", "requirements/engine-cpu.txt"),
        ),
    )
}
