"""Settings of the operator process, read from the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_operator.errors import SettingsInvalid

_MAX_PORT = 65535
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What the environment says; see the field comments for the variables."""

    loader_image: str
    """HEADRACE_LOADER_IMAGE: image of loader and sharder; required."""
    namespaces: tuple[str, ...]
    """HEADRACE_WATCH_NAMESPACES: the namespaces to serve, with commas between; all without it."""
    metrics_port: int
    """HEADRACE_METRICS_PORT: port of the Prometheus metrics, 9402."""
    liveness_port: int
    """HEADRACE_LIVENESS_PORT: port of /healthz, 8080."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ProcessSettings":
        """Read the settings.

        Raises:
            SettingsInvalid: naming the variable, its value and what is wrong with it.
        """
        image = environment.get("HEADRACE_LOADER_IMAGE", "").strip()
        if not image or any(character.isspace() for character in image):
            raise SettingsInvalid(
                f'HEADRACE_LOADER_IMAGE: "{image}": must be an image reference; set it to the '
                "image of the loader"
            )
        return cls(
            loader_image=image,
            namespaces=_namespaces(environment, "HEADRACE_WATCH_NAMESPACES"),
            metrics_port=_port(environment, "HEADRACE_METRICS_PORT", 9402),
            liveness_port=_port(environment, "HEADRACE_LIVENESS_PORT", 8080),
        )


def _namespaces(environment: Mapping[str, str], variable: str) -> tuple[str, ...]:
    names = [word.strip() for word in environment.get(variable, "").split(",")]
    wrong = next((name for name in names if name and not _NAMESPACE.fullmatch(name)), None)
    if wrong is not None:
        raise SettingsInvalid(
            f'{variable}: "{wrong}": must be a namespace; give names of lower case letters, digits '
            'and "-", with commas between'
        )
    return tuple(dict.fromkeys(filter(None, names)))


def _port(environment: Mapping[str, str], variable: str, default: int) -> int:
    value = environment.get(variable, "").strip()
    if not value:
        return default
    if value.isascii() and value.isdigit() and 0 < int(value) <= _MAX_PORT:
        return int(value)
    raise SettingsInvalid(f'{variable}: "{value}": must be a port; give a number from 1 to 65535')
