"""Generator of the custom resource definition and its reference.

    python -m headrace_operator.api.crd [--check]

writes the CRD, the charts' copies of it and the field reference. With --check it writes
nothing and fails when one of the files differs from what it would write.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from headrace_operator import api
from headrace_operator.api.reference import reference
from headrace_operator.api.schema import structural_schema
from headrace_operator.api.status import ModelDeployment
from headrace_operator.api.values import values_schema

NAME = f"{api.PLURAL}.{api.GROUP}"
_HEADER = "# Generated from operator/headrace_operator/api by `make crds`; do not edit.\n"
_ROOT = Path(__file__).parents[3]


def _column(name: str, kind: str, path: str, description: str, **more: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path, "description": description, **more}


_READY = '.status.conditions[?(@.type=="Ready")]'
_COLUMNS = [
    _column("Ready", "string", ".status.ready", "Replicas that answer requests, and asked for"),
    _column("Status", "string", f"{_READY}.reason", "Why it is ready or not"),
    _column("Checkpoint", "string", ".status.checkpoint.progress", "How far sharding is"),
    _column("Path", "string", ".status.path", "How the weights came: GDS or POSIX"),
    _column("TP", "integer", ".spec.parallelism.tensorParallelSize", "GPUs of one replica"),
    _column(
        "Updated",
        "integer",
        ".status.updatedReplicas",
        "Replicas of the newest template",
        priority=1,
    ),
    _column("Source", "string", ".spec.model.source", "Where the model comes from", priority=1),
    _column("Message", "string", f"{_READY}.message", "What it waits for", priority=1),
    _column("Age", "date", ".metadata.creationTimestamp", "Time since creation"),
]


def definition() -> dict[str, Any]:
    """Return the CustomResourceDefinition as a plain object."""
    schema = structural_schema(ModelDeployment)
    schema["properties"] = {
        "apiVersion": {"type": "string", "description": "Version of this representation."},
        "kind": {"type": "string", "description": "Kind of this object."},
        # The bound is the API server's own; stated here it bounds the cost of the rules.
        "metadata": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 253}},
        },
        **schema["properties"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {
            "group": api.GROUP,
            "names": {
                "kind": api.KIND,
                "listKind": f"{api.KIND}List",
                "plural": api.PLURAL,
                "singular": api.SINGULAR,
                "shortNames": list(api.SHORT_NAMES),
                "categories": list(api.CATEGORIES),
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": api.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": _COLUMNS,
                }
            ],
        },
    }


def outputs() -> dict[Path, str]:
    """Return the text of every generated file by its path below the repository root."""
    crd = definition()
    # Aliases are valid YAML but unreadable; the same rule objects occur several times.
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    text = _HEADER + yaml.dump(crd, Dumper=dumper, sort_keys=False, width=100)
    return {
        Path("crds", f"{NAME}.yaml"): text,
        Path("charts/headrace/files/crds", f"{NAME}.yaml"): text,
        Path("charts/headrace-model/values.schema.json"): values_schema(crd),
        Path("docs/reference/modeldeployment.md"): reference(crd),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write or check the generated files; the exit status is 1 when a check fails."""
    parser = argparse.ArgumentParser(prog="headrace_operator.api.crd", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    parser.add_argument("--root", type=Path, default=_ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    stale = []
    for path, text in outputs().items():
        target = options.root / path
        if target.exists() and target.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path))
        if not options.check:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    verb = "differs from the models, run `make crds`" if options.check else "written"
    for name in stale:
        sys.stdout.write(f"{name}: {verb}\n")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
