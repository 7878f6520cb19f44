"""What a tenant may not set in spec.pod unless the operator's settings allow it.

Volumes, security contexts, host namespaces and capabilities cannot be set at all: spec.pod has
no such fields, and Secrets, ConfigMaps and claims are references within the namespace.
"""

from headrace_operator.api.spec import ModelDeploymentSpec
from headrace_operator.plan.conditions import Draft, problem
from headrace_operator.plan.objects import canonical_json
from headrace_operator.plan.world import Settings

DENIED_FIELDS = {
    "serviceAccountName": "an account may carry rights and cloud roles of its own",
    "priorityClassName": "a high priority evicts other tenants' pods",
    "schedulerName": "another scheduler knows other rules",
    "runtimeClassName": "a runtime decides how far containers are confined",
}
"""Fields of spec.pod that are denied by default, and why."""
MAX_BYTES = 65536
"""Size of spec.pod as JSON. It is copied into every template and its history."""


def refused_overrides(spec: ModelDeploymentSpec, settings: Settings) -> Draft | None:
    """Return why spec.pod may not be used, if it may not."""
    given = spec.pod.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    for field, why in DENIED_FIELDS.items():
        if field in given and field not in settings.allowed_pod_fields:
            return problem(
                "PodFieldDenied",
                f'spec.pod.{field}: "{given[field]}": this operator denies the field, because '
                f"{why}; remove it, or have it allowed by the chart's podFields.allowed",
            )
    size = len(canonical_json(given))
    if size > MAX_BYTES:
        return problem(
            "PodOverridesTooLarge",
            f"spec.pod: {size} bytes: must be at most {MAX_BYTES}; make it smaller",
        )
    return None
