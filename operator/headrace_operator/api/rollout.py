"""Parts of the ModelDeployment spec that say how replicas are replaced and kept."""

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from headrace_operator.api.parts import Part
from headrace_operator.api.rules import INT_OR_STRING, rule, rules


def _count(field: str) -> FieldInfo:
    field_info: FieldInfo = Field(
        json_schema_extra={
            INT_OR_STRING: True,
            "pattern": "^(100|[0-9]{1,2})%$",
            "maxLength": 4,
            **rules(
                rule(
                    "type(self) == string || self >= 0",
                    field,
                    'must be a number of replicas or a percentage; give 1 or "10%"',
                    value="'a negative number'",
                )
            ),
        }
    )
    return field_info


_NONE = "[dyn(0), dyn('0%')]"


class Canary(Part):
    """The first replicas of a new template, which have to stand before the others follow."""

    percentage: Annotated[int, Field(ge=1, le=99)]
    """Replicas that are replaced first, in percent: at least one, otherwise rounded down."""
    seconds: Annotated[int, Field(ge=0, le=86400)] = 300
    """How long those replicas must have been ready before the others are replaced."""


class Rollout(Part):
    """How the replicas of a changed spec take the place of the old ones."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"!has(self.maxSurge) || !(dyn(self.maxSurge) in {_NONE} && "
                f"dyn(self.maxUnavailable) in {_NONE})",
                "spec.rollout",
                "maxSurge and maxUnavailable must not both be 0, or nothing is ever replaced; "
                "set one of them",
                value="'0'",
            )
        )
    )

    max_surge: Annotated[int | str, _count("spec.rollout.maxSurge")] = 0
    """Replicas above spec.replicas during a rollout, as a number or a percentage. They need GPUs
    of their own."""
    max_unavailable: Annotated[int | str, _count("spec.rollout.maxUnavailable")] = 1
    """Replicas below spec.replicas during a rollout, as a number or a percentage."""
    progress_deadline_seconds: Annotated[int, Field(ge=1, le=86400)] = 3600
    """Seconds in which another new replica must become ready. After them the rollout stops, and
    the last template all of whose replicas were ready comes back."""
    canary: Canary | None = None
    """Replace a few replicas first."""
    paused: bool = False
    """Replace no more replicas until this is false again. Replicas can be scaled meanwhile."""


class DisruptionBudget(Part):
    """What may be missing while nodes are drained."""

    max_unavailable: Annotated[int | str, _count("spec.disruptionBudget.maxUnavailable")] = 1
    """Serving pods that may be evicted at the same time, as a number or a percentage."""
