"""Settings of the operator process, read from the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_operator.errors import SettingsInvalid
from headrace_operator.plan.overrides import DENIED_FIELDS

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What the environment says; see the field comments for the variables."""

    loader_image: str
    """HEADRACE_LOADER_IMAGE: image of loader and sharder; required."""
    namespace: str | None
    """HEADRACE_WATCH_NAMESPACE: the one namespace to serve; all without it."""
    metrics_port: int
    """HEADRACE_METRICS_PORT: port of the Prometheus metrics, 9402."""
    liveness_port: int
    """HEADRACE_LIVENESS_PORT: port of /healthz, 8080."""
    allowed_pod_fields: frozenset[str] = frozenset()
    """HEADRACE_ALLOWED_POD_FIELDS: denied fields of spec.pod that may be used, with commas."""

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
            namespace=environment.get("HEADRACE_WATCH_NAMESPACE", "").strip() or None,
            allowed_pod_fields=_pod_fields(environment),
            metrics_port=_port(environment, "HEADRACE_METRICS_PORT", 9402),
            liveness_port=_port(environment, "HEADRACE_LIVENESS_PORT", 8080),
        )


def _pod_fields(environment: Mapping[str, str]) -> frozenset[str]:
    variable = "HEADRACE_ALLOWED_POD_FIELDS"
    fields = frozenset(filter(None, map(str.strip, environment.get(variable, "").split(","))))
    unknown = sorted(fields - DENIED_FIELDS.keys())
    if unknown:
        raise SettingsInvalid(
            f'{variable}: "{unknown[0]}": is no field that is denied; give some of '
            f"{', '.join(DENIED_FIELDS)}"
        )
    return fields


def _port(environment: Mapping[str, str], variable: str, default: int) -> int:
    value = environment.get(variable, "").strip()
    if not value:
        return default
    if value.isascii() and value.isdigit() and 0 < int(value) <= _MAX_PORT:
        return int(value)
    raise SettingsInvalid(f'{variable}: "{value}": must be a port; give a number from 1 to 65535')
