"""The kinds the operator works with and where the API server serves them."""

from dataclasses import dataclass
from urllib.parse import quote

from headrace_operator import api


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of API object. `group` is empty for the core API."""

    name: str
    group: str
    version: str
    plural: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """The value of an object's apiVersion."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        """Return the URL path of one object, or of all in a namespace or in the cluster."""
        parts = ["/apis", self.group] if self.group else ["/api"]
        parts.append(self.version)
        if self.namespaced and namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part is not None]
        return "/".join(parts)


MODEL_DEPLOYMENT = Kind(api.KIND, api.GROUP, api.VERSION, api.PLURAL)
JOB = Kind("Job", "batch", "v1", "jobs")
DEPLOYMENT = Kind("Deployment", "apps", "v1", "deployments")
SERVICE = Kind("Service", "", "v1", "services")
POD = Kind("Pod", "", "v1", "pods")
CLAIM = Kind("PersistentVolumeClaim", "", "v1", "persistentvolumeclaims")
CLAIM_TEMPLATE = Kind("ResourceClaimTemplate", "resource.k8s.io", "v1", "resourceclaimtemplates")
DISRUPTION_BUDGET = Kind("PodDisruptionBudget", "policy", "v1", "poddisruptionbudgets")
GROUP_SET = Kind("LeaderWorkerSet", "leaderworkerset.x-k8s.io", "v1", "leaderworkersets")
REPLICA_SET = Kind("ReplicaSet", "apps", "v1", "replicasets")
REVISION = Kind("ControllerRevision", "apps", "v1", "controllerrevisions")
DEVICE_CLASS = Kind("DeviceClass", "resource.k8s.io", "v1", "deviceclasses", namespaced=False)
VOLUME = Kind("PersistentVolume", "", "v1", "persistentvolumes", namespaced=False)
STORAGE_CLASS = Kind("StorageClass", "storage.k8s.io", "v1", "storageclasses", namespaced=False)
NODE = Kind("Node", "", "v1", "nodes", namespaced=False)
EVENT = Kind("Event", "", "v1", "events")

CHILDREN = (
    JOB,
    DEPLOYMENT,
    GROUP_SET,
    DISRUPTION_BUDGET,
    SERVICE,
    POD,
    CLAIM,
    CLAIM_TEMPLATE,
)
"""Kinds that are watched, by the label of their ModelDeployment."""
WATCHED = (MODEL_DEPLOYMENT, *CHILDREN)

_BY_NAME = {kind.name: kind for kind in (*WATCHED, VOLUME, STORAGE_CLASS, NODE, EVENT)}


def kind_named(name: str) -> Kind:
    """Return the kind of a name; KeyError for one the operator does not work with."""
    return _BY_NAME[name]
