"""The volume: claim and static PersistentVolume, and the condition VolumeReady."""

from typing import Any

from headrace_operator.api.spec import ModelDeploymentSpec, StaticVolume
from headrace_operator.plan.conditions import Draft, holds, of_rejection, problem, waiting
from headrace_operator.plan.names import (
    MANAGED_BY,
    MANAGED_BY_LABEL,
    NAMESPACE_LABEL,
    OWNER_LABEL,
    child_name,
    labels,
    metadata,
)
from headrace_operator.plan.objects import Object, at, is_deleting, mapping, name_of, text
from headrace_operator.plan.world import Deletion, Desired, Observed

DRIVER = "fsx.csi.aws.com"
_WRITABLE = frozenset({"ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"})


def claim_name(owner: Object, spec: ModelDeploymentSpec) -> str | None:
    """Return the name of the claim that holds the checkpoints; None when there is none."""
    if spec.volume.existing_claim is not None:
        return spec.volume.existing_claim.name
    return child_name(name_of(owner), "weights") if spec.volume.static is not None else None


def volume_name(owner: Object) -> str:
    """Return the name of the static volume; "." occurs in no namespace, so names cannot clash."""
    return f"{text(owner, 'metadata', 'namespace')}.{name_of(owner)}-weights"


def desired_volume(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed
) -> tuple[list[Desired], list[Deletion]]:
    """Return the objects of a static volume, and a released one to replace.

    A released volume remembers the UID of the claim it was bound to and never binds again.
    Its reclaim policy is Retain, so deleting it touches no data.
    """
    static = spec.volume.static
    if static is None:
        return [], []
    if text(observed.volume, "status", "phase") == "Released" and observed.volume is not None:
        uid = text(observed.volume, "metadata", "uid")
        return [], [Deletion("PersistentVolume", volume_name(owner), None, uid)]
    return [
        Desired(_persistent_volume(owner, static), once=True),
        Desired(_claim(owner, static), once=True),
    ], []


def volume_ready(owner: Object, spec: ModelDeploymentSpec, observed: Observed) -> Draft:
    """Return the condition VolumeReady."""
    name = claim_name(owner, spec)
    if name is None:
        return problem(
            "DynamicProvisioningUnsupported",
            "spec.volume.dynamic: this version provisions no file system; create it and use "
            "spec.volume.static or spec.volume.existingClaim",
        )
    rejection = observed.rejection("PersistentVolume", "PersistentVolumeClaim")
    if rejection is not None:
        return of_rejection(rejection)
    if observed.claim is None:
        return _missing_claim(owner, spec, name)
    return _claim_state(observed.claim, name)


def is_usable(observed: Observed) -> bool:
    """Whether pods may be made that mount the claim.

    A pending claim is usable: its StorageClass may wait for the first pod before it binds.
    """
    claim = observed.claim
    return (
        claim is not None
        and not is_deleting(claim)
        and text(claim, "status", "phase") != "Lost"
        and _is_writable(claim)
    )


def is_orphan(volume: Object, *, is_wanted: bool) -> bool:
    """Whether a volume of ours serves nobody any more and can go; its data stay.

    Args:
        is_wanted: whether the ModelDeployment it was made for still asks for it.
    """
    labels = mapping(volume, "metadata", "labels")
    namespace, owner = text(labels, NAMESPACE_LABEL), text(labels, OWNER_LABEL)
    return (
        not is_wanted
        and text(labels, MANAGED_BY_LABEL) == MANAGED_BY
        and name_of(volume) == f"{namespace}.{owner}-weights"
        and text(volume, "spec", "csi", "driver") == DRIVER
        and text(volume, "spec", "persistentVolumeReclaimPolicy") == "Retain"
        and text(volume, "status", "phase") == "Released"
        and not is_deleting(volume)
    )


def _missing_claim(owner: Object, spec: ModelDeploymentSpec, name: str) -> Draft:
    if spec.volume.existing_claim is None:
        return waiting("ClaimCreating", f"claim {name} is being created")
    return problem(
        "ClaimNotFound",
        f'spec.volume.existingClaim.name: "{name}": there is no such claim in namespace '
        f"{text(owner, 'metadata', 'namespace')}; create it or correct the name",
    )


def _claim_state(claim: Object, name: str) -> Draft:
    phase = text(claim, "status", "phase")
    if is_deleting(claim):
        return problem("ClaimTerminating", f"claim {name} is being deleted; create it again")
    if phase == "Lost":
        return problem("ClaimLost", f"claim {name} has lost its volume; restore the volume")
    if not _is_writable(claim):
        modes = ", ".join(_access_modes(claim))
        return problem(
            "ClaimReadOnly",
            f"claim {name}: accessModes {modes}: the shard Job writes the checkpoint; use a claim "
            "with ReadWriteMany",
        )
    if phase == "Bound":
        return holds("Bound", f"claim {name} is bound to {text(claim, 'spec', 'volumeName')}")
    return waiting("ClaimPending", f"claim {name} is not bound yet")


def _access_modes(claim: Object) -> list[str]:
    modes = at(claim, "spec", "accessModes")
    return [mode for mode in modes if isinstance(mode, str)] if isinstance(modes, list) else []


def _is_writable(claim: Object) -> bool:
    modes = _access_modes(claim)
    return not modes or not _WRITABLE.isdisjoint(modes)


def _persistent_volume(owner: Object, static: StaticVolume) -> dict[str, Any]:
    namespace = text(owner, "metadata", "namespace")
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {
            "name": volume_name(owner),
            "labels": {**labels(owner), NAMESPACE_LABEL: namespace},
        },
        "spec": {
            "capacity": {"storage": f"{static.capacity_gib}Gi"},
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "volumeMode": "Filesystem",
            "mountOptions": list(static.mount_options),
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": namespace,
                "name": child_name(name_of(owner), "weights"),
            },
            "csi": {
                "driver": DRIVER,
                "volumeHandle": static.file_system_id,
                "volumeAttributes": {
                    "dnsname": static.dns_name,
                    "mountname": static.mount_name,
                },
            },
        },
    }


def _claim(owner: Object, static: StaticVolume) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(owner, child_name(name_of(owner), "weights")),
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeMode": "Filesystem",
            "volumeName": volume_name(owner),
            "resources": {"requests": {"storage": f"{static.capacity_gib}Gi"}},
        },
    }
