"""Conversion of pydantic's JSON schema into the structural schema of a CRD.

A structural schema has no references, no nullable unions and no titles, gives every value
a type, and its defaults are literal: an object whose fields all have defaults gets the
default {} so that the API server fills it in.
"""

from typing import Any, TypeAlias

from pydantic import BaseModel

from headrace_operator.api.rules import INT_OR_STRING, PRESERVE_UNKNOWN

Schema: TypeAlias = dict[str, Any]

_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "default",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
)


def structural_schema(model: type[BaseModel]) -> Schema:
    """Return the structural schema of a model and everything it holds."""
    schema = model.model_json_schema(by_alias=True)
    return _convert(schema, schema.get("$defs", {}))


def _convert(schema: Schema, definitions: Schema) -> Schema:
    schema = _resolve(schema, definitions)
    if schema.get(INT_OR_STRING):
        kept = ("description", "default", "pattern", "maxLength", "x-kubernetes-validations")
        return {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            INT_OR_STRING: True,
            **{key: schema[key] for key in kept if key in schema},
        }
    result = {key: schema[key] for key in _KEPT if schema.get(key) is not None}
    if "const" in schema:
        result["enum"] = [schema["const"]]
    if schema.get("type") == "object":
        result |= _object_parts(schema, definitions)
    if "items" in schema:
        result["items"] = _convert(schema["items"], definitions)
    result |= {key: value for key, value in schema.items() if key.startswith("x-kubernetes-")}
    return result


def _object_parts(schema: Schema, definitions: Schema) -> Schema:
    if schema.get(PRESERVE_UNKNOWN):
        return {}
    parts: Schema = {}
    if "properties" in schema:
        required = schema.get("required", [])
        parts["properties"] = {
            name: _property(value, name in required, definitions)
            for name, value in schema["properties"].items()
        }
        if required:
            parts["required"] = required
    elif isinstance(schema.get("additionalProperties"), dict):
        parts["additionalProperties"] = _convert(schema["additionalProperties"], definitions)
    return parts


def _property(schema: Schema, required: bool, definitions: Schema) -> Schema:
    converted = _convert(schema, definitions)
    if "$ref" in schema and not required:
        converted["default"] = {}
    return converted


def _resolve(schema: Schema, definitions: Schema) -> Schema:
    """Merge references and the one branch of a union with null into the schema itself."""
    while True:
        if "$ref" in schema:
            target = definitions[schema["$ref"].rpartition("/")[2]]
            rest = {key: value for key, value in schema.items() if key != "$ref"}
        elif "anyOf" in schema and not schema.get(INT_OR_STRING):
            (target,) = (branch for branch in schema["anyOf"] if branch.get("type") != "null")
            rest = {key: value for key, value in schema.items() if key not in {"anyOf", "default"}}
        else:
            return schema
        schema = {**target, **rest, **_joined_rules(target, rest)}


def _joined_rules(target: Schema, rest: Schema) -> Schema:
    key = "x-kubernetes-validations"
    joined = [*target.get(key, []), *rest.get(key, [])]
    return {key: joined} if joined else {}
