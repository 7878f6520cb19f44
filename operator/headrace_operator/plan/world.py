"""What goes into a plan and what comes out: plain immutable data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace_operator.plan.objects import Object, name_of, text, uid_of

NAME_CONFLICT = "NameConflict"
"""Reason of a rejection: an object that someone else controls has the child's name."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the operator that reach into the objects it makes."""

    loader_image: str
    static_volumes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """File systems that spec.volume.static may name, by namespace; "*" stands for all."""
    allowed_pod_fields: frozenset[str] = frozenset()
    """Fields of spec.pod that are denied unless they are here."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the API server, or ownership, kept a child from being applied."""

    kind: str
    name: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class LoadedPath:
    """How a loader's weights came: by GPUDirect Storage, or why not."""

    direct: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Observed:
    """The children of one ModelDeployment and what else its plan depends on.

    `claim` and `source_claim` are the claims by name, whoever owns them; the other objects
    are controlled by the ModelDeployment, but for Jobs that delete checkpoints. `volume` is the
    static volume, or the one that the
    claim is bound to. `warnings` holds the latest warning event by the UID of a stuck pod, Job
    or claim, `loaded_paths` what the loaders tell, by the UID of their pod, `paths_in_use` the
    checkpoints of all other ModelDeployments, on whatever volume. `deployment` is the
    LeaderWorkerSet where replicas span nodes, `history` its ControllerRevisions, or the
    ReplicaSets of the Deployment, looked up when its rollout has failed. None means unknown, or
    not there; `unreadable` has the kinds that the operator may not read.
    """

    claim: Object | None = None
    source_claim: Object | None = None
    volume: Object | None = None
    storage_class: Object | None = None
    jobs: tuple[Object, ...] = ()
    deployment: Object | None = None
    history: tuple[Object, ...] = ()
    disruption_budget: Object | None = None
    service: Object | None = None
    claims: tuple[Object, ...] = ()
    claim_templates: tuple[Object, ...] = ()
    pods: tuple[Object, ...] = ()
    gpus_of_nodes: frozenset[int] | None = None
    dra_served: bool | None = None
    device_classes: frozenset[str] | None = None
    groups_served: bool | None = None
    warnings: Mapping[str, Object] = field(default_factory=dict)
    loaded_paths: Mapping[str, LoadedPath] = field(default_factory=dict)
    paths_in_use: frozenset[str] = frozenset()
    rejections: tuple[Rejection, ...] = ()
    unreadable: frozenset[str] = frozenset()

    def rejection(self, *kinds: str) -> Rejection | None:
        """Return the first rejection of a child of the given kinds."""
        return next((r for r in self.rejections if r.kind in kinds), None)


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to be looked up by name before planning."""

    claim: str | None = None
    source_claim: str | None = None
    volume: str | None = None
    storage_class: str | None = None
    gpus_of_nodes: bool = False
    dra_served: bool = False
    device_classes: bool = False
    groups_served: bool = False
    loaded_paths: bool = False
    paths_in_use: bool = False


@dataclass(frozen=True, slots=True)
class Desired:
    """An object to apply. `once` objects are created and never changed (Job templates are
    immutable)."""

    body: Object
    once: bool = False


@dataclass(frozen=True, slots=True)
class Deletion:
    """An object to delete, if it still has that UID."""

    kind: str
    name: str
    namespace: str | None
    uid: str

    @classmethod
    def of(cls, body: Object) -> "Deletion":
        """Return the deletion of an object."""
        namespace = text(body, "metadata", "namespace") or None
        return cls(text(body, "kind"), name_of(body), namespace, uid_of(body))


@dataclass(frozen=True, slots=True)
class Scale:
    """A Deployment or LeaderWorkerSet that keeps its template: what may change of the rest."""

    kind: str
    name: str
    spec: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of a condition, to be reported as an event.

    `key` is the same whenever the same change is planned again, so that the event has the
    same name.
    """

    key: str
    condition: str
    reason: str
    message: str
    warning: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order: delete, apply and scale children, report events, write the status.

    What is deleted is needed by nothing that exists: the rest may fail.
    """

    delete: tuple[Deletion, ...] = ()
    apply: tuple[Desired, ...] = ()
    scale: Scale | None = None
    status: Mapping[str, Any] | None = None
    transitions: tuple[Transition, ...] = ()
    requeue_seconds: float | None = None
    finalizer: bool | None = None
    """Whether our finalizer has to be there; None where it does not matter."""
