"""The spec of a ModelDeployment: the single source of the CRD's schema, defaults and rules."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from headrace_operator.api.parts import (
    Engine,
    Part,
    PodOverrides,
    Resources,
    Sharding,
    without_gpus,
)
from headrace_operator.api.rollout import DisruptionBudget, Rollout
from headrace_operator.api.rules import every, matches, object_name, rule, rules

MAX_TENSOR_PARALLEL_SIZE = 64

_SOURCE = "spec.model.source"
_DIRECTORY = "^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$"
# Options of mount.lustre(8) that neither name files of the node nor reach beyond the mount.
_MOUNT_OPTION = (
    "^(no)?(flock|lazystatfs|user_xattr|user_fid2path|checksum|verbose|atime|diratime)$|"
    "^(localflock|always_ping|relatime|nosuid|nodev|noexec|rw|_netdev|retry=[0-9]{1,3})$"
)


class Model(Part):
    """The model: where its files are and how its weights are stored."""

    source: Annotated[str, Field(max_length=1024)] = Field(
        json_schema_extra=rules(
            rule(
                "self.matches('^(pvc|s3|hf)://')",
                _SOURCE,
                "must start with pvc://, s3:// or hf://; give pvc://<claim>/<path>, "
                "s3://<bucket>/<prefix> or hf://<owner>/<name>",
            ),
            rule(
                "!self.startsWith('s3://') || self.matches("
                "'^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/[^/\\\\s][^\\\\s]*$')",
                _SOURCE,
                "must name a bucket and a prefix in it; give s3://<bucket>/<prefix>",
            ),
            rule(
                "!self.startsWith('hf://') || self.matches("
                "'^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$')",
                _SOURCE,
                "must name a repository; give hf://<owner>/<name> and spec.model.revision",
            ),
            rule(
                "!self.startsWith('pvc://') || self.matches("
                "'^pvc://[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/[^/\\\\s][^\\\\s]*$')",
                _SOURCE,
                "must name a claim and a directory in it; give pvc://<claim>/<path>",
            ),
            rule(
                "!self.startsWith('pvc://') || "
                "!self.substring(6).split('/').exists(p, p == '..' || p == '.')",
                _SOURCE,
                'must not have "." or ".." as a path component; give the plain path',
            ),
        )
    )
    """Where config.json and the safetensors files are: pvc://<claim>/<path>, s3://<bucket>/<prefix>
    or hf://<owner>/<name>, a repository of the Hugging Face Hub."""
    revision: Annotated[str, Field(max_length=256)] = Field(
        default="main",
        json_schema_extra=matches(
            "spec.model.revision",
            "^[A-Za-z0-9][A-Za-z0-9._/-]*$",
            'must be a revision; use letters, digits, ".", "_", "/" and "-"',
        ),
    )
    """Revision of the model: branch, tag or commit of an hf:// source, any word for the others.
    Part of the checkpoint's identity: change it with the files."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights; auto keeps the type that the model's config.json names."""
    quantization: Literal["none", "fp8"] = "none"
    """What the shard Job makes of the weights: none keeps them as they are, quantized or not; fp8
    makes FP8 of an unquantized model, with a scale for each output channel."""


def _must_be_one(name: str) -> dict[str, Any]:
    return rules(
        rule(
            "self == 1",
            f"spec.parallelism.{name}",
            "must be 1 in this version; set it to 1 and use tensorParallelSize",
            value="'more than 1'",
        )
    )


class Parallelism(Part):
    """How one replica is spread over GPUs and nodes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                # An empty object, as the default is, is checked before it gets its own defaults.
                "!has(self.nodes) || self.tensorParallelSize % self.nodes == 0",
                "spec.parallelism.nodes",
                "must divide tensorParallelSize: every node holds as many ranks; "
                "change one of them",
                value="'several'",
                at=".nodes",
            ),
            rule(
                "!has(self.nodes) || !has(oldSelf.nodes) || "
                "(self.nodes > 1) == (oldSelf.nodes > 1)",
                "spec.parallelism.nodes",
                "a replica of one node cannot become one of several, nor the reverse: old and new "
                "pods would need their GPUs at the same time; create a new ModelDeployment",
                value="'changed'",
                at=".nodes",
            ),
        )
    )

    tensor_parallel_size: Annotated[int, Field(ge=1, le=MAX_TENSOR_PARALLEL_SIZE)] = 1
    """GPUs of one replica; every layer is cut into as many shards."""
    pipeline_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, json_schema_extra=_must_be_one("pipelineParallelSize")
    )
    """Stages of layers; must be 1 in this version."""
    expert_parallel_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, json_schema_extra=_must_be_one("expertParallelSize")
    )
    """Groups of experts; must be 1 in this version."""
    nodes: Annotated[int, Field(ge=1, le=32)] = 1
    """Nodes of one replica. More than one makes a LeaderWorkerSet, whose controller has to be
    installed; every node loads tensorParallelSize / nodes ranks."""

    @property
    def gpus_per_node(self) -> int:
        """GPUs, and ranks, that a replica has on each of its nodes."""
        return self.tensor_parallel_size // self.nodes


class ExistingClaim(Part):
    """A PersistentVolumeClaim that exists already."""

    name: Annotated[str, Field(max_length=253)] = Field(
        json_schema_extra=object_name("spec.volume.existingClaim.name")
    )
    """Name of the claim, in the namespace of the ModelDeployment."""


class StaticVolume(Part):
    """An existing FSx for Lustre file system, mounted by the driver fsx.csi.aws.com."""

    file_system_id: Annotated[str, Field(max_length=64)] = Field(
        json_schema_extra=matches(
            "spec.volume.static.fileSystemId",
            "^fs-[0-9a-f]{8,40}$",
            "must be the ID of a file system; give fs- and its hexadecimal digits",
        ),
    )
    """ID of the file system."""
    dns_name: Annotated[str, Field(max_length=253)] = Field(
        json_schema_extra=object_name("spec.volume.static.dnsName")
    )
    """DNS name of the file system: <fileSystemId>.fsx.<region>.amazonaws.com."""
    mount_name: Annotated[str, Field(max_length=32)] = Field(
        default="fsx",
        json_schema_extra=matches(
            "spec.volume.static.mountName",
            "^[A-Za-z0-9_-]+$",
            'must be the mount name of the file system; give letters, digits, "-" and "_"',
        ),
    )
    """Mount name of the file system."""
    sub_path: Annotated[str, Field(max_length=512)] = Field(
        default="",
        json_schema_extra=rules(
            rule(
                f"self == '' || self.matches('{_DIRECTORY}')",
                "spec.volume.static.subPath",
                'must be a relative directory, no component of which starts with "."; give a path '
                "such as team-a/models",
            )
        ),
    )
    """Directory of the file system to mount; it has to exist. Empty: all of it."""
    capacity_gib: Annotated[int, Field(ge=1, le=10_000_000, alias="capacityGiB")]
    """Capacity of the file system in GiB, for the volume's bookkeeping."""
    mount_options: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=16)] = (
        Field(
            default=["flock"],
            json_schema_extra=rules(
                every(
                    f"e.matches('{_MOUNT_OPTION}')",
                    "spec.volume.static.mountOptions",
                    "must be a mount option of Lustre clients that touches this mount alone; give "
                    "one option per item",
                )
            ),
        )
    )
    """Mount options, such as flock, noatime, nosuid or retry=3."""


class DynamicVolume(Part):
    """A file system that a StorageClass provisions, once."""

    storage_class_name: Annotated[str, Field(max_length=253)] = Field(
        json_schema_extra=object_name("spec.volume.dynamic.storageClassName")
    )
    """StorageClass of the claim."""
    capacity_gib: Annotated[int, Field(ge=1, le=10_000_000, alias="capacityGiB")]
    """Capacity to provision in GiB, a size that FSx has: it is never rounded."""
    reclaim_policy: Literal["Retain", "Delete"] = "Retain"
    """What becomes of the file system with the ModelDeployment. Retain: the claim stays, and a
    ModelDeployment of the same name goes on with it. Delete: the claim goes, and all data with
    it. The StorageClass must have the same reclaimPolicy."""


_KINDS_GIVEN = "[has(self.existingClaim), has(self.static), has(self.dynamic)].filter(x, x).size()"


class Volume(Part):
    """The volume that holds the checkpoints: exactly one of the three kinds."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"{_KINDS_GIVEN} == 1",
                "spec.volume",
                "must have exactly one of existingClaim, static, dynamic; keep one",
                value=f"({_KINDS_GIVEN} == 0 ? 'none' : 'several')",
            ),
            rule(
                "!has(self.static) || !has(oldSelf.static) || self.static == oldSelf.static",
                "spec.volume.static",
                "a volume in use cannot become another one; create a new ModelDeployment",
                value="self.static.fileSystemId",
                at=".static",
            ),
        )
    )

    existing_claim: ExistingClaim | None = None
    """Use a claim that exists already."""
    static: StaticVolume | None = None
    """Make a volume and a claim for an existing file system. Cannot be changed."""
    dynamic: DynamicVolume | None = None
    """Provision a file system, which costs money from then on."""
    root: Annotated[str, Field(max_length=512)] = Field(
        default="headrace",
        json_schema_extra=rules(
            rule(
                f"self.matches('{_DIRECTORY}')",
                "spec.volume.root",
                'must be a relative directory, no component of which starts with "."; give a path '
                "such as headrace or team/headrace",
            )
        ),
    )
    """Directory on the volume that holds the checkpoints."""


class Checkpoint(Part):
    """What happens to the sharded checkpoint that the volume holds."""

    reclaim_policy: Literal["Retain", "Delete"] = "Retain"
    """Retain checkpoints, or Delete one that this ModelDeployment has used, once it is deleted or
    changed and no other ModelDeployment or loader uses it."""


class Loading(Part):
    """How the loader reads the weights, and when the engine starts."""

    path: Literal["Require", "Prefer", "Off"] = "Prefer"
    """GPUDirect Storage: Require it, on nodes labelled headrace.dev/gds=verified; Prefer it and
    fall back loudly; or keep it Off."""
    gate: Literal["Loaded", "Overlap"] = "Loaded"
    """Start the engine when the weights are Loaded, or at once and Overlap both."""
    resources: Resources = Field(
        default_factory=Resources, json_schema_extra=without_gpus("spec.loading.resources")
    )
    """Compute resources of the loader. The weights count against it without a GPU."""


class Gpu(Part):
    """How loader and engine get the same GPUs."""

    sharing: Literal["ResourceClaim", "WholeNode", "None"] = "ResourceClaim"
    """ResourceClaim: one DRA claim for both containers. WholeNode: the engine requests all
    GPUs of its node and the loader sees them. None: no GPU, weights in host memory."""
    device_class_name: Annotated[str, Field(max_length=253)] = Field(
        default="gpu.nvidia.com", json_schema_extra=object_name("spec.gpu.deviceClassName")
    )
    """DeviceClass of the claim for sharing ResourceClaim."""
    preset: Literal["P5en", "P6-B200", "P6-B300", "P6e-GB200"] | None = None
    """Kind of EC2 instance: its node selector, shared memory and, for replicas that span nodes,
    its EFA interfaces, huge pages and the right to lock memory."""


class ModelDeploymentSpec(Part):
    """What the user wants served."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.gpu.sharing != 'None' || self.loading.path == 'Off'",
                "spec.loading.path",
                "there is no direct path without a GPU (spec.gpu.sharing is None); set it to Off",
                value="self.loading.path",
                at=".loading.path",
            )
        )
    )

    replicas: Annotated[int, Field(ge=0, le=10000)] = 1
    """Replicas of the engine. Belongs to the user or to an autoscaler, through /scale."""
    model: Model
    """The model to serve."""
    parallelism: Parallelism = Field(default_factory=Parallelism)
    """How one replica is spread over GPUs."""
    volume: Volume
    """The volume that holds the checkpoints."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """What happens to the checkpoint on the volume."""
    loading: Loading = Field(default_factory=Loading)
    """How the weights are loaded."""
    gpu: Gpu = Field(default_factory=Gpu)
    """How loader and engine get the same GPUs."""
    engine: Engine
    """The inference engine."""
    rollout: Rollout = Field(default_factory=Rollout)
    """How the replicas of a changed spec take the place of the old ones."""
    disruption_budget: DisruptionBudget = Field(default_factory=DisruptionBudget)
    """What may be missing while nodes are drained; for more than one replica."""
    sharding: Sharding = Field(default_factory=Sharding)
    """The Job that shards the model."""
    pod: PodOverrides = Field(default_factory=PodOverrides)
    """Fields of the pods."""
