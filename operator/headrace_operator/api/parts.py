"""Parts of the ModelDeployment spec that describe pods: engine, sharding and pod overrides."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from headrace_operator.api.rules import (
    Passthrough,
    Quantity,
    every,
    label_syntax,
    matches,
    object_name,
    owned_keys,
    rule,
    rules,
)

LOADER_PORT = 9400
OWNED_KEYS = r"^(headrace[.]dev/|app[.]kubernetes[.]io/(name|instance|component|managed-by)$)"
# What Kubernetes' controllers find their pods by, and annotations that undo a pod's confinement.
_CONTROLLERS_LABELS = (
    r"^(pod-template-hash|controller-revision-hash|controller-uid|job-name|"
    r"(apps|batch|statefulset)[.]kubernetes[.]io/.*|leaderworkerset[.]sigs[.]k8s[.]io/.*)$"
)
_CONFINING_ANNOTATIONS = (
    r"^(container[.])?(apparmor[.]security[.]beta|seccomp[.]security[.]alpha)[.]kubernetes[.]io/"
)

# vLLM's parser takes "_" for "-" and a value after "=" or as the next argument.
_OWNED_ARGS = {
    "--model": "set spec.model.source",
    "--load-format": "the weights come from the loader",
    "--dtype": "set spec.model.dtype",
    "(--quantization|-q)": "set spec.model.quantization",
    "(--tensor-parallel-size|-tp)": "set spec.parallelism.tensorParallelSize",
    "(--pipeline-parallel-size|-pp)": "set spec.parallelism.pipelineParallelSize",
    "(--data-parallel-size|-dp)": "set spec.replicas",
    "(--nnodes|-n)": "set spec.parallelism.nodes",
    "(--node-rank|-r)": "set spec.parallelism.nodes",
    "(--master-addr|--master-port)": "set spec.parallelism.nodes",
    "--headless": "set spec.parallelism.nodes",
    "--host": "the engine listens on all addresses of its pod",
    "--port": "set spec.engine.port",
}


StringMap = Annotated[dict[str, Annotated[str, Field(max_length=8192)]], Field(max_length=64)]
PassthroughList = Annotated[list[Passthrough], Field(max_length=64)]
Argument = Annotated[str, Field(max_length=4096)]


class Part(BaseModel):
    """Base of all parts of the spec: camelCase outside, immutable, unknown fields dropped.

    The API server has pruned unknown fields already; dropping them here as well lets an
    older operator read objects that a newer one has written.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        frozen=True,
        extra="ignore",
    )


def _pattern_of(flag: str) -> str:
    flags = flag.strip("()").split("|")
    names = "|".join(name[:2] + name[2:].replace("-", "[-_]") for name in flags)
    return f"^({names})(=|$)"


def _owned_arg(flag: str, fix: str) -> dict[str, str]:
    return every(
        f"!e.matches('{_pattern_of(flag)}')",
        "spec.engine.args",
        f"the operator sets this argument; remove it ({fix})",
    )


_NOT_ABOVE_LIMIT = (
    "quantity(string(self.requests[r])).compareTo(quantity(string(self.limits[r]))) <= 0"
)


class Resources(Part):
    """Compute resources of one container, as in the core API."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.requests) || !has(self.limits) || self.requests.all(r, "
                f"!(r in self.limits) || {_NOT_ABOVE_LIMIT})",
                "resources.requests",
                "must be at most the limit; lower the request or raise the limit",
                value=f"self.requests.filter(r, (r in self.limits) && !({_NOT_ABOVE_LIMIT}))[0]",
                at=".requests",
            )
        )
    )

    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(default_factory=dict)
    """Most that the container may use, by resource name."""
    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(default_factory=dict)
    """What the container is guaranteed, by resource name."""


def without_gpus(field: str) -> dict[str, Any]:
    """Attach the rule that resources do not ask for GPUs."""
    return rules(
        rule(
            "!(has(self.limits) && 'nvidia.com/gpu' in self.limits) && "
            "!(has(self.requests) && 'nvidia.com/gpu' in self.requests)",
            field,
            "the operator requests GPUs itself; remove it and set spec.gpu.sharing and "
            "spec.parallelism.tensorParallelSize",
            value="'nvidia.com/gpu'",
        )
    )


_ONE_VALUE = rule(
    "!(has(self.value) && has(self.valueFrom))",
    "env",
    "must have value or valueFrom, not both; remove one",
    value="self.name",
)


class EnvVar(Part):
    """One environment variable, as in the core API."""

    model_config = ConfigDict(json_schema_extra=rules(_ONE_VALUE))

    name: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        json_schema_extra=rules(
            rule(
                "self != 'PYTHONPATH' && !self.startsWith('HEADRACE_')",
                "env",
                "the operator sets this variable; choose another name",
            )
        )
    )
    """Name of the variable."""
    value: Annotated[str, Field(max_length=32768)] | None = None
    """Value of the variable."""
    value_from: Passthrough | None = None
    """Source of the value: configMapKeyRef, secretKeyRef, fieldRef or resourceFieldRef."""


class ShardEnvVar(EnvVar):
    """One environment variable of the shard Job; secrets come by reference alone."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            _ONE_VALUE,
            rule(
                "!has(self.value) || "
                "!(self.name in ['AWS_SECRET_ACCESS_KEY', 'AWS_SESSION_TOKEN', 'HF_TOKEN'])",
                "env",
                "must not be written down here; give valueFrom.secretKeyRef",
                value="self.name",
            ),
        )
    )


_MERGED_BY_NAME: dict[str, Any] = {
    "x-kubernetes-list-type": "map",
    "x-kubernetes-list-map-keys": ["name"],
}


KV_CACHE_DTYPES: dict[str, int] = {
    "auto": 0,
    "float16": 0,
    "bfloat16": 0,
    "fp8": 0,
    "fp8_e4m3": 0,
    "fp8_e5m2": 0,
    "turboquant_k8v4": 20,
    "turboquant_4bit_nc": 20,
    "turboquant_k3v4_nc": 20,
    "turboquant_3bit_nc": 20,
    "int8_per_token_head": 20,
    "fp8_per_token_head": 20,
    "nvfp4": 20,
    "int4_per_token_head": 25,
}
"""Values of vLLM's --kv-cache-dtype, and the minor version 0.x of vLLM that knows them first.

Source: `CacheDType` in vllm/config/cache.py of the wheels 0.18 to 0.32; 0 where 0.18 knows it.
"""


def _option(flag: str, field: str) -> dict[str, str]:
    """Return the rule that an option is not given as a field and as an argument."""
    return rule(
        f"!has(self.{field}) || !has(self.args) || "
        f"!self.args.exists(e, e.matches('{_pattern_of(flag)}'))",
        "spec.engine.args",
        f"is given by spec.engine.{field} as well; remove one",
        value=f"'{flag}'",
        at=".args",
    )


def _known_since(minor: int) -> dict[str, str]:
    """Return the rule that an image whose tag is an older version of vLLM is not asked for it."""
    names = ", ".join(f"'{name}'" for name, since in KV_CACHE_DTYPES.items() if since == minor)
    older = "|".join(str(number) for number in range(minor))
    return rule(
        f"!has(self.kvCacheDtype) || !(self.kvCacheDtype in [{names}]) || "
        f"!self.image.matches(':v?0[.]({older})([.-]|$)')",
        "spec.engine.kvCacheDtype",
        f"needs vLLM 0.{minor} or newer; choose another value or a newer spec.engine.image",
        value="self.kvCacheDtype",
        at=".kvCacheDtype",
    )


class Engine(Part):
    """The inference engine: a stock image that gets the weights from the loader."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            _option("--max-model-len", "maxModelLen"),
            _option("--max-num-seqs", "maxNumSeqs"),
            _option("--kv-cache-dtype", "kvCacheDtype"),
            *(_known_since(minor) for minor in sorted({*KV_CACHE_DTYPES.values()} - {0})),
        )
    )

    image: Annotated[str, Field(max_length=1024)] = Field(
        json_schema_extra=matches(
            "spec.engine.image",
            r"^[^\\s]+$",
            "must be an image reference without blanks; give name:tag or name@digest",
        ),
    )
    """Image of the engine."""
    command: Annotated[list[Argument], Field(max_length=64)] = Field(
        default=["python3", "-m", "vllm.entrypoints.openai.api_server"], min_length=1
    )
    """Command that starts the engine; the operator's arguments and `args` follow it."""
    args: Annotated[list[Argument], Field(max_length=128)] = Field(
        default_factory=list,
        json_schema_extra=rules(*(_owned_arg(flag, fix) for flag, fix in _OWNED_ARGS.items())),
    )
    """More arguments of the engine. Arguments that the operator sets are refused."""
    env: Annotated[list[EnvVar], Field(max_length=256)] = Field(
        default_factory=list, json_schema_extra=_MERGED_BY_NAME
    )
    """Environment of the engine."""
    max_model_len: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Context length in tokens, prompt and answer; the model's own without it."""
    max_num_seqs: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Requests in a batch at most; vLLM's default without it."""
    kv_cache_dtype: Literal[tuple(KV_CACHE_DTYPES)] | None = None  # type: ignore[valid-type]
    """Type of the KV cache's values; vLLM's default without it. The turboquant_ presets hold 2 to 5
    times as many tokens as bfloat16."""
    compiled_code: Literal["Shared", "PerPod"] = "Shared"
    """Shared: what the first engine compiled is kept on the volume and restored in every later pod.
    PerPod: each pod compiles for itself."""
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=8000,
        json_schema_extra=rules(
            rule(
                f"self != {LOADER_PORT}",
                "spec.engine.port",
                "is the port of the loader in the same pod; choose another port",
                value=f"'{LOADER_PORT}'",
            )
        ),
    )
    """Port the engine serves HTTP on. The Service maps its port 80 to it."""
    resources: Resources = Field(
        default_factory=Resources, json_schema_extra=without_gpus("spec.engine.resources")
    )
    """Compute resources of the engine; GPUs are requested as `gpu` says."""


class Sharding(Part):
    """The Job that cuts the model into one shard per rank, on CPU nodes."""

    parallelism: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pods that share the work; by default as many as tensorParallelSize, at most 8."""
    resources: Resources = Field(
        default_factory=Resources, json_schema_extra=without_gpus("spec.sharding.resources")
    )
    """Compute resources of each pod of the shard Job."""
    env: Annotated[list[ShardEnvVar], Field(max_length=64)] = Field(
        default_factory=list, json_schema_extra=_MERGED_BY_NAME
    )
    """Environment of the shard Job, for sources: AWS_... for s3://, HF_... for hf://."""
    node_selector: StringMap = Field(default_factory=dict)
    """Labels of the nodes that may run the shard Job."""
    tolerations: PassthroughList = Field(default_factory=list)
    """Tolerations of the shard Job, as in the core API."""


class PodOverrides(Part):
    """Fields of the serving pods, and where it makes sense of the shard Job's pod."""

    labels: StringMap = Field(
        default_factory=dict,
        json_schema_extra=rules(
            owned_keys("spec.pod.labels", OWNED_KEYS),
            every(
                f"!e.matches('{_CONTROLLERS_LABELS}')",
                "spec.pod.labels",
                "Kubernetes' controllers find pods by this label; choose another one",
            ),
            *label_syntax("spec.pod.labels"),
        ),
    )
    """More labels of the serving pods."""
    annotations: StringMap = Field(
        default_factory=dict,
        json_schema_extra=rules(
            owned_keys("spec.pod.annotations", OWNED_KEYS),
            every(
                f"!e.matches('{_CONFINING_ANNOTATIONS}')",
                "spec.pod.annotations",
                "would change the confinement of the containers; remove it",
            ),
        ),
    )
    """More annotations of the serving pods."""
    node_selector: StringMap = Field(default_factory=dict)
    """Labels of the nodes that may run the serving pods."""
    tolerations: PassthroughList = Field(default_factory=list)
    """Tolerations of the serving pods, as in the core API."""
    affinity: Passthrough | None = None
    """Affinity of the serving pods, as in the core API."""
    topology_spread_constraints: PassthroughList = Field(default_factory=list)
    """Topology spread constraints of the serving pods, as in the core API."""
    service_account_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, json_schema_extra=object_name("spec.pod.serviceAccountName")
    )
    """ServiceAccount of all pods. Its token is not mounted."""
    priority_class_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, json_schema_extra=object_name("spec.pod.priorityClassName")
    )
    """PriorityClass of the serving pods."""
    scheduler_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, json_schema_extra=object_name("spec.pod.schedulerName")
    )
    """Scheduler of the serving pods."""
    runtime_class_name: Annotated[str, Field(max_length=253)] | None = Field(
        default=None, json_schema_extra=object_name("spec.pod.runtimeClassName")
    )
    """RuntimeClass of the serving pods."""
    image_pull_secrets: PassthroughList = Field(default_factory=list)
    """Pull secrets of all pods, as in the core API."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """Pull policy of all containers."""
    run_as_user: Annotated[int, Field(ge=1, le=2147483647)] = 1000
    """User that all containers run as: loader and engine share memory only as one user."""
    fs_group: Annotated[int, Field(ge=1, le=2147483647)] = 1000
    """Group that owns the volumes' files."""
    termination_grace_period_seconds: Annotated[int, Field(ge=0, le=3600)] = 60
    """Seconds between the request to stop and the kill of a serving pod."""
