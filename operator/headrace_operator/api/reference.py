"""The field reference of a CRD in Markdown, made from its schema."""

import json
from collections.abc import Iterator
from typing import Any

_INTRODUCTION = """\
# ModelDeployment

`apiVersion: {group}/{version}`, `kind: {kind}`, short name `{short}`. Generated from the
models in `operator/headrace_operator/api` by `make crds`; what the conditions mean is in
[conditions.md](conditions.md).

A manifest is refused by the API server when it has an unknown field (`kubectl` asks for strict
validation), a value of the wrong type, or breaks one of the rules below. Fields marked
*as in the core API* are checked by the API server when the operator applies the child that
carries them; a refusal there is a condition of the ModelDeployment.
"""


def reference(crd: dict[str, Any]) -> str:
    """Return the reference of the CRD's first version as Markdown."""
    spec = crd["spec"]
    version = spec["versions"][0]
    text = _INTRODUCTION.format(
        group=spec["group"],
        version=version["name"],
        kind=spec["names"]["kind"],
        short=spec["names"]["shortNames"][0],
    )
    schema = version["schema"]["openAPIV3Schema"]
    for part in ("spec", "status"):
        text += f"\n## {part}\n\n| field | type | default | meaning |\n|---|---|---|---|\n"
        text += "".join(_rows(part, schema["properties"][part]))
    text += "\n## Rules\n\nEach is checked by the API server (CEL).\n\n"
    text += "".join(f"- {message}\n" for message in _messages(schema))
    return text


def _rows(path: str, schema: dict[str, Any]) -> Iterator[str]:
    required = schema.get("required", [])
    for name, value in schema.get("properties", {}).items():
        field = f"{path}.{name}"
        yield (
            f"| `{field}` | {_type(value)} | {_default(value, required=name in required)} "
            f"| {_cell(value.get('description', ''))} |\n"
        )
        yield from _rows(field, value)
        yield from _rows(f"{field}[]", value.get("items", {}))


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    if "additionalProperties" in schema:
        return f"map to {_type(schema['additionalProperties'])}"
    name = str(schema.get("type", "number or percentage" if "default" in schema else "quantity"))
    bounds = [schema.get("minimum"), schema.get("maximum")]
    if all(bound is not None for bound in bounds):
        return f"{name} {bounds[0]}..{bounds[1]}"
    return name


def _default(schema: dict[str, Any], *, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    return "" if default in (None, {}) else f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _messages(schema: dict[str, Any]) -> Iterator[str]:
    for validation in schema.get("x-kubernetes-validations", []):
        yield _readable(validation["messageExpression"])
    children = list(schema.get("properties", {}).values())
    children += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    for child in children:
        yield from _messages(child)


def _readable(expression: str) -> str:
    """Turn the CEL expression of a message into the message, with "…" for the value."""
    field, _, rest = expression.partition("' + ")
    text = rest.rpartition(" + '")[2].removesuffix("'")
    return f"{field[1:]}…{text}".replace("\\'", "'")
