"""The status of a ModelDeployment, and the root object that joins it with the spec."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace_operator.api.parts import Part
from headrace_operator.api.rules import rule, rules
from headrace_operator.api.spec import ModelDeploymentSpec


class ConditionType(StrEnum):
    """The conditions of a ModelDeployment; all are set on the first visit."""

    VOLUME_READY = "VolumeReady"
    CHECKPOINT_READY = "CheckpointReady"
    WEIGHTS_RESIDENT = "WeightsResident"
    AVAILABLE = "Available"
    READY = "Ready"
    DIRECT_PATH = "DirectPath"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class Condition(Part):
    """One aspect of the state, in the shape of the API conventions."""

    type: Annotated[str, Field(max_length=316)]
    """Name of the aspect."""
    status: Literal["True", "False", "Unknown"]
    """Whether the aspect holds."""
    reason: Annotated[str, Field(max_length=128, pattern="^[A-Z][A-Za-z0-9]*$")]
    """One CamelCase word for machines."""
    message: Annotated[str, Field(max_length=32768)]
    """Explanation for humans."""
    observed_generation: Annotated[int, Field(ge=0, json_schema_extra={"format": "int64"})] = 0
    """Generation of the spec that the condition was computed from."""
    last_transition_time: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When the status last changed."""


class CheckpointStatus(Part):
    """The sharded checkpoint of the current spec."""

    key: str
    """Digest that names the checkpoint."""
    path: str
    """Directory of the checkpoint on the volume."""
    progress: str | None = None
    """How far sharding is, in percent."""
    total_bytes: Annotated[int, Field(json_schema_extra={"format": "int64"})] | None = None
    """Bytes of all shards, once published."""
    job: str
    """Job that makes the checkpoint."""
    workers: int | None = None
    """Pods that share the work, each with an index."""
    completed_indexes: str | None = None
    """Indexes of the pods that have done their share, such as 0-2,5."""


class RolloutStatus(Part):
    """How far the rollout of replicas of several nodes is, while it has not ended."""

    template: str
    """Digest that names the new template."""
    ready_replicas: int
    """New replicas that are ready."""
    progressed_at: Annotated[str, Field(json_schema_extra={"format": "date-time"})]
    """When the last of them became ready, or the rollout began or went on after a pause."""


class VolumeStatus(Part):
    """The volume in use."""

    claim_name: str
    """Claim that the pods mount."""
    claim_uid: Annotated[str | None, Field(alias="claimUID")] = None
    """UID of that claim; a provisioned one that was deleted is not made again."""
    volume_name: str | None = None
    """PersistentVolume that the claim is bound to."""


class ModelDeploymentStatus(Part):
    """What is there."""

    observed_generation: Annotated[int, Field(json_schema_extra={"format": "int64"})] | None = None
    """Generation of the spec that the status was computed from."""
    replicas: int | None = None
    """Replicas that exist."""
    ready_replicas: int | None = None
    """Replicas that answer requests."""
    updated_replicas: int | None = None
    """Replicas of the newest template."""
    ready: str | None = None
    """Replicas that answer requests, and those asked for: "2/3"."""
    path: str | None = None
    """How the weights came: GDS, POSIX, or nothing while no loader has told."""
    selector: str | None = None
    """Label selector of the serving pods, for autoscalers."""
    conditions: list[Condition] = Field(
        default_factory=list,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["type"],
        },
    )
    """State by aspect."""
    checkpoint: CheckpointStatus | None = None
    """The checkpoint of the current spec."""
    volume: VolumeStatus | None = None
    """The volume in use."""
    rollout: RolloutStatus | None = None
    """The rollout of replicas of several nodes, while there is one."""


class ModelDeployment(BaseModel):
    """A model served from weights that wait in GPU memory."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra=rules(
            # The Service has the same name, and label values hold at most 63 characters.
            rule(
                "self.metadata.name.matches('^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$')",
                "metadata.name",
                "must be a DNS label, as the Service has the same name; use at most 63 lower case "
                'letters, digits and "-", starting with a letter',
                value="self.metadata.name",
                at=".metadata.name",
            )
        ),
    )

    spec: ModelDeploymentSpec
    """What the user wants served."""
    status: ModelDeploymentStatus | None = None
    """What is there."""
