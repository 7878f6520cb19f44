"""The values of the chart headrace-model: its own, and the spec as the CRD has it.

JSON Schema knows no CEL, so the rules between fields stay with the API server; types, ranges and
misspelt names are refused by Helm, with their path.
"""

import json
from typing import Any

_STRING = {"type": "string"}
_PEERS = {"type": "array", "items": {"type": "object"}}
_EGRESS = "Serving pods reach DNS and pods of the same model alone, shard pods DNS and the source."
_EGRESS_SOURCE = "Egress rules of shard pods whose source is s3:// or hf://, as in the core API."


def values_schema(definition: dict[str, Any]) -> str:
    """Return values.schema.json for a CustomResourceDefinition's first version."""
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = _strict(schema["properties"]["spec"])
    own = {
        "global": {"type": "object", "description": "Values shared with parent charts."},
        "name": _STRING | {"description": "Name of the ModelDeployment; empty: the release's."},
        "labels": _map("Labels of every object."),
        "annotations": _map("Annotations of the ModelDeployment."),
        "spec": spec,
        "keda": _part(
            "A KEDA ScaledObject that sets the replicas.",
            enabled=_flag("Make it; spec.replicas is then left to it."),
            minReplicas=_count("Replicas at least; 0 needs triggers that work without a pod.", 0),
            maxReplicas=_count("Replicas at most.", 1),
            cooldownSeconds=_count("Time before the last replica goes.", 0),
            prometheus=_STRING | {"description": "Address of Prometheus, for the default trigger."},
            waitingRequests=_count("Waiting requests that a replica is added for.", 1),
            triggers=_PEERS | {"description": "Triggers of KEDA, instead of the default one."},
        ),
        "networkPolicy": _part(
            "A NetworkPolicy for the pods: who may ask and, if so wanted, what they may reach.",
            enabled=_flag("Make it."),
            clients=_PEERS | {"description": "Who may ask the engine; empty: everyone."},
            monitors=_PEERS | {"description": "Who may reach the loader's port; empty: everyone."},
            egress=_part(
                "What the pods may reach.",
                enabled=_flag(_EGRESS),
                source=_PEERS | {"description": _EGRESS_SOURCE},
            ),
        ),
        "test": _part(
            "The pod of `helm test`.",
            image=_STRING | {"description": "An image with python3, such as the loader's."},
        ),
    }
    document = {"$schema": "https://json-schema.org/draft-07/schema#", **_part("", **own)}
    document |= {"description": "Values of the chart headrace-model.", "required": ["spec"]}
    return json.dumps(document, indent=1) + "\n"


def _part(description: str, **properties: object) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "additionalProperties": False,
        "properties": properties,
    }


def _map(description: str) -> dict[str, Any]:
    return {"type": "object", "description": description, "additionalProperties": _STRING}


def _flag(description: str) -> dict[str, Any]:
    return {"type": "boolean", "description": description}


def _count(description: str, minimum: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": minimum, "description": description}


def _strict(schema: object) -> object:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: value if key in ("default", "enum") else _strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key != "format"
    }
    if isinstance(kept.get("properties"), dict) and kept.get("type") == "object":
        kept["additionalProperties"] = False
    return kept
