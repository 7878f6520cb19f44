"""The archives that imagebuild makes, opened far enough to see configuration and files."""

import functools
import json
import tarfile

import pytest

import imagebuild


class Archive:
    """An OCI archive."""

    def __init__(self, path):
        self.path = path

    def blob(self, name):
        with tarfile.open(self.path) as tar:
            return json.load(tar.extractfile(name))

    def manifest(self):
        (reference,) = self.blob("index.json")["manifests"]
        return self.blob(f"blobs/sha256/{reference['digest'].removeprefix('sha256:')}")

    def config(self):
        digest = self.manifest()["config"]["digest"].removeprefix("sha256:")
        return self.blob(f"blobs/sha256/{digest}")["config"]

    @functools.cached_property
    def files(self):
        """Paths of all files in all layers, directories left out."""
        names = set()
        with tarfile.open(self.path) as tar:
            for layer in self.manifest()["layers"]:
                stored = tar.extractfile(f"blobs/sha256/{layer['digest'].removeprefix('sha256:')}")
                with tarfile.open(fileobj=stored, mode="r:*") as content:
                    names.update(member.name for member in content if not member.isdir())
        return names

    def packages(self):
        """Names of the distributions installed for the image's own program."""
        parts = (name.split("/") for name in self.files)
        return {
            folder.split("-")[0]
            for part in parts
            for folder in part
            if folder.endswith(".dist-info") and "opt" in part
        }


@pytest.fixture(scope="session")
def archives():
    return {name: Archive(path) for name, path in imagebuild.ensure().items()}
