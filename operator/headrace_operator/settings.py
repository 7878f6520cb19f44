"""Settings of the operator process, read from the environment."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_operator.errors import SettingsInvalid
from headrace_operator.plan.overrides import DENIED_FIELDS

_MAX_PORT = 65535
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """What the environment says; see the field comments for the variables."""

    loader_image: str
    """HEADRACE_LOADER_IMAGE: image of loader and sharder; required."""
    namespaces: tuple[str, ...]
    """HEADRACE_WATCH_NAMESPACES: the namespaces to serve, with commas between; all without it."""
    static_volumes: Mapping[str, frozenset[str]]
    """HEADRACE_STATIC_VOLUMES: JSON object of lists, the file systems that each namespace may name
    in spec.volume.static; none without it."""
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
            namespaces=_namespaces(environment, "HEADRACE_WATCH_NAMESPACES"),
            static_volumes=_static_volumes(environment.get("HEADRACE_STATIC_VOLUMES", "")),
            allowed_pod_fields=_pod_fields(environment),
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


def _static_volumes(value: str) -> Mapping[str, frozenset[str]]:
    try:
        found = json.loads(value) if value.strip() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(map(_is_list_of_text, found.values())):
        raise SettingsInvalid(
            f'HEADRACE_STATIC_VOLUMES: "{value}": must be a JSON object of lists; give '
            '{"<namespace>": ["fs-<digits>", "fs-<digits>/<directory>"]}'
        )
    return {namespace: frozenset(entries) for namespace, entries in found.items()}


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


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
