"""What `up` was asked for and decided: written before anything is started."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from .errors import InvalidInputError
from .files import write_private

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Record:
    """The options of a cluster and the addresses chosen for it."""

    node: bool
    kwok: int
    kwok_stages: str = ""
    images: str = ""
    api_server: Mapping[str, str] = field(default_factory=dict)
    controller_manager: Mapping[str, str] = field(default_factory=dict)
    snapshotter: str = ""
    server: str = ""

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Return the record at `path`, or None when there is none.

        Raises InvalidInputError when the file is not one.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{path}: is not a cluster record ({error}); delete it"
            ) from error

    def save(self, path: Path) -> None:
        """Write the record to `path` atomically."""
        write_private(path, json.dumps(dataclasses.asdict(self)))
