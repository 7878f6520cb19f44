"""The volume: claim and static PersistentVolume, and the condition VolumeReady.

Nothing here ever deletes a claim to make it again: for a provisioned one that would be a second
file system.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from headrace_operator.api.spec import DynamicVolume, ModelDeploymentSpec, StaticVolume
from headrace_operator.plan.conditions import Draft, holds, of_rejection, problem, waiting
from headrace_operator.plan.fsx import DNS_NAME, DRIVER, judge
from headrace_operator.plan.names import (
    MANAGED_BY,
    MANAGED_BY_LABEL,
    NAMESPACE_LABEL,
    OWNER_LABEL,
    child_name,
    labels,
    metadata,
)
from headrace_operator.plan.objects import (
    Object,
    at,
    controller_uid,
    is_deleting,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.provisioning import of_warning
from headrace_operator.plan.world import Deletion, Desired, Observed, Settings

_WRITABLE = frozenset({"ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"})
_ANY = "*"


@dataclass(frozen=True, slots=True)
class Volume:
    """What to do about the volume, and how far it is; `claim` is what pods may mount."""

    draft: Draft
    apply: tuple[Desired, ...] = ()
    delete: tuple[Deletion, ...] = ()
    claim: str | None = None
    status: dict[str, str] = field(default_factory=dict)


def claim_name(owner: Object, spec: ModelDeploymentSpec) -> str:
    """Return the name of the claim that holds the checkpoints."""
    if spec.volume.existing_claim is not None:
        return spec.volume.existing_claim.name
    return child_name(name_of(owner), "weights")


def volume_name(owner: Object) -> str:
    """Return the name of the static volume; "." occurs in no namespace, so names cannot clash."""
    return f"{text(owner, 'metadata', 'namespace')}.{name_of(owner)}-weights"


def plan_volume(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed, settings: Settings
) -> Volume:
    """Decide about claim and static volume, and derive VolumeReady."""
    if spec.volume.static is not None:
        planned = _plan_static(owner, spec.volume.static, observed, settings)
    elif spec.volume.dynamic is not None:
        planned = _plan_dynamic(owner, spec.volume.dynamic, observed)
    else:
        planned = Volume(_state(owner, spec, observed))
    rejection = observed.rejection("PersistentVolume", "PersistentVolumeClaim")
    draft = planned.draft if rejection is None else of_rejection(rejection)
    claim = claim_name(owner, spec) if _is_ours(owner, spec, observed.claim) else None
    status = _status(owner, spec, observed, is_ours=claim is not None)
    return Volume(draft, planned.apply, planned.delete, claim, status)


def _plan_static(
    owner: Object, static: StaticVolume, observed: Observed, settings: Settings
) -> Volume:
    """Plan for an existing file system.

    A released volume remembers the UID of the claim it was bound to and never binds again.
    Its reclaim policy is Retain, so deleting it touches no data.
    """
    forbidden = _forbidden(owner, static, settings)
    if forbidden is not None:
        return Volume(forbidden)
    name = child_name(name_of(owner), "weights")
    volume, wanted = observed.volume, _persistent_volume(owner, static)
    if volume is not None and _is_left_over(owner, volume, wanted):
        draft = waiting("ClaimCreating", f"volume {name_of(volume)} is left over and is replaced")
        return Volume(draft, delete=(Deletion.of(volume),))
    draft = _of_claim(name, observed) or _creating(name)
    bound = text(observed.claim, "spec", "volumeName")
    if bound not in ("", volume_name(owner)):
        draft = problem(
            "ClaimDiffers",
            f"spec.volume.static: claim {name} was made for volume {bound}, before the spec "
            "changed; undo the change, or use another ModelDeployment",
        )
    if draft.holds and _is_labelled(owner, volume) and not _is_same(volume, wanted):
        draft = problem(
            "VolumeDiffers",
            f"volume {name_of(volume)} is not what spec.volume.static says, but of "
            f"{text(volume, 'spec', 'csi', 'volumeHandle')} with "
            f"{text(volume, 'spec', 'persistentVolumeReclaimPolicy')}; delete claim {name}, and "
            "both are made again. No data are touched",
        )
    # The claim first: a namespace on its way out refuses it, and no volume is left behind.
    return Volume(draft, (Desired(_claim(owner, static), once=True), Desired(wanted, once=True)))


def _plan_dynamic(owner: Object, dynamic: DynamicVolume, observed: Observed) -> Volume:
    """Plan for a claim that a StorageClass provisions a file system for, once."""
    name = child_name(name_of(owner), "weights")
    wanted = (Desired(_provisioned_claim(owner, dynamic), once=True),)
    if observed.claim is not None:
        differs = _differs(observed.claim, dynamic)
        return Volume(differs or _of_provisioned(name, dynamic, observed), wanted)
    if _known_uid(owner, name):
        fix = (
            "to go on with it, make the claim again for the volume that is left; for a new file "
            "system, delete this ModelDeployment and create it again"
        )
        return Volume(
            problem(
                "ClaimDeleted",
                f"claim {name} was deleted, and its file system may still be there; {fix}",
            )
        )
    return _before_provisioning(name, dynamic, observed, wanted)


def _before_provisioning(
    name: str, dynamic: DynamicVolume, observed: Observed, wanted: tuple[Desired, ...]
) -> Volume:
    field_name = f'spec.volume.dynamic.storageClassName: "{dynamic.storage_class_name}"'
    if observed.storage_class is None and "StorageClass" in observed.unreadable:
        fix = "the operator may not read StorageClasses; install the chart's ClusterRole"
        return Volume(problem("StorageClassForbidden", f"{field_name}: {fix}"))
    if observed.storage_class is None:
        fix = "there is no such StorageClass; create it or correct the name"
        return Volume(problem("StorageClassNotFound", f"{field_name}: {fix}"))
    policy = text(observed.storage_class, "reclaimPolicy") or "Delete"
    refused = judge(observed.storage_class, dynamic.capacity_gib)
    if policy != dynamic.reclaim_policy:
        refused = _policy_differs(dynamic, f"StorageClass {dynamic.storage_class_name}", policy)
    return Volume(refused) if refused is not None else Volume(_creating(name), wanted)


def _policy_differs(dynamic: DynamicVolume, whose: str, policy: str) -> Draft:
    return problem(
        "ReclaimPolicyMismatch",
        f'spec.volume.dynamic.reclaimPolicy: "{dynamic.reclaim_policy}": {whose} has {policy}; '
        "use a StorageClass with the same reclaimPolicy, or correct the spec",
    )


def _of_provisioned(name: str, dynamic: DynamicVolume, observed: Observed) -> Draft:
    draft = _of_claim(name, observed) or _creating(name)
    policy = text(observed.volume, "spec", "persistentVolumeReclaimPolicy")
    if draft.holds and policy not in ("", dynamic.reclaim_policy):
        return _policy_differs(dynamic, f"volume {name_of(observed.volume)}", policy)
    if draft.reason != "ClaimPending":
        return draft
    return waiting("Provisioning", f"claim {name}: its file system is being provisioned")


def _differs(claim: Object, dynamic: DynamicVolume) -> Draft | None:
    asked = (dynamic.storage_class_name, f"{dynamic.capacity_gib}Gi")
    has = (
        text(claim, "spec", "storageClassName"),
        text(claim, "spec", "resources", "requests", "storage"),
    )
    if asked == has:
        return None
    return problem(
        "ClaimDiffers",
        f"spec.volume.dynamic: claim {name_of(claim)} is of StorageClass {has[0]} with {has[1]}, "
        f"not {asked[0]} with {asked[1]}; a file system is made once: undo the change, or use "
        "another ModelDeployment",
    )


def _state(owner: Object, spec: ModelDeploymentSpec, observed: Observed) -> Draft:
    name = claim_name(owner, spec)
    return _of_claim(name, observed) or problem(
        "ClaimNotFound",
        f'spec.volume.existingClaim.name: "{name}": there is no such claim in namespace '
        f"{text(owner, 'metadata', 'namespace')}; create it or correct the name",
    )


def _creating(name: str) -> Draft:
    return waiting("ClaimCreating", f"claim {name} is being created")


def _forbidden(owner: Object, static: StaticVolume, settings: Settings) -> Draft | None:
    """Return why a namespace may not have the file system.

    A volume is an object of the cluster, and the operator may make one where the user may
    not. So the administrator says which namespace may use which file system, and the DNS
    name, which is what nodes mount, has to be that file system's.
    """
    namespace = text(owner, "metadata", "namespace")
    host = static.dns_name
    if not re.fullmatch(DNS_NAME, host) or host.partition(".")[0] != static.file_system_id:
        return problem(
            "StaticVolumeForbidden",
            f'spec.volume.static.dnsName: "{host}": must be the DNS name of file system '
            f"{static.file_system_id}; give {static.file_system_id}.fsx.<region>.amazonaws.com",
        )
    allowed = {
        *settings.static_volumes.get(namespace, ()),
        *settings.static_volumes.get(_ANY, ()),
    }
    if any(_covers(entry, static) for entry in allowed):
        return None
    what = static.file_system_id + (f"/{static.sub_path}" if static.sub_path else "")
    return problem(
        "StaticVolumeForbidden",
        f'spec.volume.static.fileSystemId: "{what}": namespace {namespace} may not use it; have '
        "the administrator add it to the chart's value staticVolumes, or use existingClaim",
    )


def _covers(entry: str, static: StaticVolume) -> bool:
    """Whether an entry such as fs-0123, fs-0123/team-a or * allows a file system's directory."""
    file_system, _, directory = entry.partition("/")
    if file_system not in (_ANY, static.file_system_id):
        return False
    return not directory or f"{static.sub_path}/".startswith(f"{directory}/")


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

    An Available one was made for a claim that never came to be.

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
        and text(volume, "status", "phase") in ("Released", "Available")
        and not is_deleting(volume)
    )


def _of_claim(name: str, observed: Observed) -> Draft | None:
    """Return the state of the claim and its volume; None without a claim."""
    claim = observed.claim
    if claim is None:
        return None
    phase = text(claim, "status", "phase")
    if is_deleting(claim):
        fix = "it goes once no pod uses it"
        return problem("ClaimTerminating", f"claim {name} is being deleted; {fix}")
    if phase == "Lost":
        return problem("ClaimLost", f"claim {name} has lost its volume; restore the volume")
    if not _is_writable(claim):
        modes = ", ".join(_access_modes(claim))
        return problem(
            "ClaimReadOnly",
            f"claim {name}: accessModes {modes}: the shard Job writes the checkpoint; use a claim "
            "with ReadWriteMany",
        )
    if phase != "Bound":
        return of_warning(name, mapping(observed.warnings, uid_of(claim)))
    sick = _of_volume(observed.volume, claim)
    bound = text(claim, "spec", "volumeName")
    return sick or holds("Bound", f"claim {name} is bound to {bound}")


def _of_volume(volume: Object | None, claim: Object) -> Draft | None:
    """Return what is wrong about a claim's volume; None where nothing is known."""
    if volume is None or text(volume, "spec", "claimRef", "uid") != uid_of(claim):
        return None
    name = name_of(volume)
    if text(volume, "status", "phase") == "Failed":
        message = text(volume, "status", "message") or "its reclamation failed"
        return problem("VolumeFailed", f"volume {name}: {message}")
    if is_deleting(volume):
        return problem(
            "VolumeTerminating",
            f"volume {name} is being deleted and goes with its claim {name_of(claim)}; pods that "
            "run keep it. Copy what is needed and make both again",
        )
    return None


def _access_modes(claim: Object) -> list[str]:
    modes = at(claim, "spec", "accessModes")
    return [mode for mode in modes if isinstance(mode, str)] if isinstance(modes, list) else []


def _is_writable(claim: Object) -> bool:
    modes = _access_modes(claim)
    return not modes or not _WRITABLE.isdisjoint(modes)


def _is_left_over(owner: Object, volume: Object, wanted: Object) -> bool:
    """Whether a volume of ours, without a claim, is of an earlier claim or specification."""
    phase = text(volume, "status", "phase")
    is_stale = phase == "Released" or (phase == "Available" and not _is_same(volume, wanted))
    is_kept = text(volume, "spec", "persistentVolumeReclaimPolicy") == "Retain"
    return is_stale and is_kept and _is_labelled(owner, volume)


def _is_same(volume: Object | None, wanted: Object) -> bool:
    """Whether a volume is of the same file system and keeps it."""
    same = (
        ("spec", "csi", "volumeHandle"),
        ("spec", "csi", "volumeAttributes"),
        ("spec", "persistentVolumeReclaimPolicy"),
    )
    return all(at(volume, *path) == at(wanted, *path) for path in same)


def _is_labelled(owner: Object, volume: Object | None) -> bool:
    found = mapping(volume, "metadata", "labels")
    return all(found.get(key) == value for key, value in _volume_labels(owner).items())


def _is_ours(owner: Object, spec: ModelDeploymentSpec, claim: Object | None) -> bool:
    """Whether pods may mount the claim: one of the user's, or one that was made for this owner."""
    dynamic = spec.volume.dynamic
    if claim is None or spec.volume.existing_claim is not None:
        return True
    if dynamic is not None and dynamic.reclaim_policy == "Retain":
        found = mapping(claim, "metadata", "labels")
        has_labels = all(found.get(key) == value for key, value in labels(owner).items())
        return has_labels and not controller_uid(claim)
    return controller_uid(claim) == uid_of(owner)


def _status(
    owner: Object, spec: ModelDeploymentSpec, observed: Observed, *, is_ours: bool
) -> dict[str, str]:
    """Return the volume's part of the status; a provisioned claim is remembered by its UID."""
    name = claim_name(owner, spec)
    claim = observed.claim if is_ours else None
    uid = uid_of(claim) or (_known_uid(owner, name) if spec.volume.dynamic else "")
    bound = text(claim, "spec", "volumeName")
    found = {"claimName": name, "claimUID": uid, "volumeName": bound}
    return {key: value for key, value in found.items() if value}


def _known_uid(owner: Object, name: str) -> str:
    known = mapping(owner, "status", "volume")
    return text(known, "claimUID") if text(known, "claimName") == name else ""


def _volume_labels(owner: Object) -> dict[str, str]:
    return {**labels(owner), NAMESPACE_LABEL: text(owner, "metadata", "namespace")}


def _persistent_volume(owner: Object, static: StaticVolume) -> dict[str, Any]:
    namespace = text(owner, "metadata", "namespace")
    mount = f"{static.mount_name}/{static.sub_path}" if static.sub_path else static.mount_name
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": volume_name(owner), "labels": _volume_labels(owner)},
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
                # The driver mounts <dnsname>@tcp:/<mountname>, and Lustre takes a directory
                # behind the name of the file system.
                "volumeAttributes": {"dnsname": static.dns_name, "mountname": mount},
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


def _provisioned_claim(owner: Object, dynamic: DynamicVolume) -> dict[str, Any]:
    """Return the claim to provision for; a retained one has no owner and outlives it."""
    is_owned = dynamic.reclaim_policy == "Delete"
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(owner, child_name(name_of(owner), "weights"), owned=is_owned),
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": dynamic.storage_class_name,
            "volumeMode": "Filesystem",
            "resources": {"requests": {"storage": f"{dynamic.capacity_gib}Gi"}},
        },
    }
