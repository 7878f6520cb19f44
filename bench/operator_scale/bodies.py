"""The children that the peer makes: those of Headrace's own plan, with blanks for what varies."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan import Observed, Settings, plan
from headrace_operator.plan.names import SPEC_HASH_ANNOTATION, checkpoint_key

from .cluster import manifest

LOADER_IMAGE = "loader:1"
_NAMESPACE = "blank-space"
_NAME = "blank-owner"
_REPLICAS = 9876


def peer_bodies() -> dict[str, str]:
    """Return the JSON of Job, Deployment, Service and PodDisruptionBudget by kind."""
    owner = manifest(0, _REPLICAS)
    owner["metadata"] = {"name": _NAME, "namespace": _NAMESPACE, "uid": "@UID@", "generation": 1}
    owner["spec"]["model"]["source"] = f"pvc://weights/{_NAME}"
    claim = {"metadata": {"name": "weights"}, "status": {"phase": "Bound"}}
    before = Observed(claim=claim, source_claim=claim)
    (job,) = _applied(owner, before)
    done = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    job_done = {**job, **done, "metadata": {**job["metadata"], "uid": "job"}}
    after = Observed(claim=claim, source_claim=claim, jobs=(job_done,))
    children = (job, *_applied(owner, after))
    return {body["kind"]: _with_blanks(body, owner) for body in children}


def _applied(owner: dict[str, Any], observed: Observed) -> tuple[dict[str, Any], ...]:
    planned = plan(owner, observed, Settings(LOADER_IMAGE), datetime.now(UTC))
    return tuple(desired.body for desired in planned.apply)


def _with_blanks(body: dict[str, Any], owner: dict[str, Any]) -> str:
    key = checkpoint_key(ModelDeploymentSpec.model_validate(owner["spec"]))
    blanks = {key: "@KEY@", key[:8]: "@KEY8@", _NAME: "@NAME@", _NAMESPACE: "@NAMESPACE@"}
    blanks[str(_REPLICAS)] = "@REPLICAS@"
    annotations = body["metadata"].get("annotations", {})
    if SPEC_HASH_ANNOTATION in annotations:
        blanks[annotations[SPEC_HASH_ANNOTATION]] = "@HASH@"
    text = json.dumps(body)
    for value, blank in blanks.items():
        text = text.replace(value, blank)
    return text
