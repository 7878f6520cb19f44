"""Builds the container images of this repository into archives that containerd imports.

    python -m imagebuild [NAME ...]

An archive is named after a digest of everything that went into it, so building again without
a change does nothing.
"""

from .images import IMAGES, Image
from .store import ensure

__all__ = ["IMAGES", "Image", "ensure"]
