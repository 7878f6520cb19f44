"""Rules of FSx for Lustre, as data: what a StorageClass of its CSI driver may ask for.

A file system takes up to half an hour to make and is paid for by the hour, and the driver hands
most of its parameters on unseen. So they are judged before the claim is made. Sources:

    API     CreateFileSystem and CreateFileSystemLustreConfiguration of the FSx API reference
    GUIDE   FSx for Lustre user guide, "Increasing storage capacity" and "EFA-enabled file systems"
    DRIVER  kubernetes-sigs/aws-fsx-csi-driver v1.9.0: pkg/driver/controller.go, pkg/util/util.go,
            and its issues 367 and 412 (S3 links)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from headrace_operator.plan.conditions import Draft, problem
from headrace_operator.plan.objects import Object, mapping, name_of, text

DRIVER = "fsx.csi.aws.com"
DNS_NAME = (
    "^fs-[0-9a-f]{8,40}[.]fsx[.][a-z0-9-]{1,32}[.]"
    "(amazonaws[.]com([.]cn)?|c2s[.]ic[.]gov|sc2s[.]sgov[.]gov)$"
)
"""DNS names of FSx file systems, which start with the file system's ID (API, DNSName)."""
_S3_LINK = ("s3ImportPath", "s3ExportPath", "autoImportPolicy")
_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
"""What the driver takes for true (DRIVER: strconv.ParseBool)."""


@dataclass(frozen=True, slots=True)
class Tier:
    """File systems of one deployment type and storage type.

    `sizes` are valid capacities in GiB beside the multiples of `steps`, which are by throughput
    in MB/s per TiB; 0 stands for a type whose throughput cannot be chosen. `efa_steps` are the
    multiples with EFA.
    """

    deployment: str
    storage: str
    steps: Mapping[int, int]
    sizes: tuple[int, ...] = ()
    efa_steps: Mapping[int, int] | None = None


TIERS = (
    # API, StorageCapacity: 1200, 2400 and increments of 3600; of 2400 for the newer ones.
    Tier("SCRATCH_1", "SSD", {0: 3600}, (1200, 2400)),
    Tier("SCRATCH_2", "SSD", {0: 2400}, (1200,)),
    # API, PerUnitStorageThroughput: 50, 100, 200 with SSD and 12, 40 with HDD.
    Tier("PERSISTENT_1", "SSD", {50: 2400, 100: 2400, 200: 2400}, (1200,)),
    Tier("PERSISTENT_1", "HDD", {12: 6000, 40: 1800}),
    # API: 125, 250, 500, 1000. GUIDE: capacity of EFA-enabled file systems by throughput.
    Tier(
        "PERSISTENT_2",
        "SSD",
        {125: 2400, 250: 2400, 500: 2400, 1000: 2400},
        (1200,),
        {125: 38400, 250: 19200, 500: 9600, 1000: 4800},
    ),
)
_INTELLIGENT_TIERING = "INTELLIGENT_TIERING"
_DRIVE_CACHES = ("NONE", "READ")  # API, DriveCacheType: required for HDD
_METADATA_MODES = ("AUTOMATIC", "USER_PROVISIONED")  # API, MetadataConfiguration.Mode
_METADATA_IOPS = (1500, 3000, 6000, *range(12000, 192001, 12000))  # API, MetadataConfiguration.Iops
_EFA_VERSION = "2.15"  # GUIDE: EFA needs Lustre 2.15


def judge(storage_class: Object, capacity_gib: int) -> Draft | None:
    """Return why FSx or its driver would not make the file system; None where nothing is known.

    Args:
        storage_class: the StorageClass. One of another provisioner is not judged.
        capacity_gib: the capacity that the claim asks for.
    """
    if text(storage_class, "provisioner") != DRIVER:
        return None
    given = {k: v for k, v in mapping(storage_class, "parameters").items() if isinstance(v, str)}
    asked = _Asked(name_of(storage_class), given)
    return _of_network(asked) or _of_type(asked, capacity_gib)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A StorageClass of the driver; its parameters are all strings."""

    name: str
    parameters: Mapping[str, str]

    def get(self, parameter: str, default: str = "") -> str:
        return self.parameters.get(parameter) or default

    @property
    def efa(self) -> bool:
        return self.get("efaEnabled") in _TRUE

    @property
    def deployment(self) -> str:
        tiering = self.get("storageType") == _INTELLIGENT_TIERING
        return self.get("deploymentType", "PERSISTENT_2" if tiering else "SCRATCH_1")

    def refuse(self, parameter: str, rule: str, reason: str = "StorageClassInvalid") -> Draft:
        value = self.parameters.get(parameter, "")
        return problem(reason, f'StorageClass {self.name}: {parameter}: "{value}": {rule}')


def _of_network(asked: _Asked) -> Draft | None:
    if not re.fullmatch("subnet-[a-z0-9-]+", asked.get("subnetId")):
        return asked.refuse("subnetId", "must be the one subnet of the file system; give its ID")
    groups = asked.get("securityGroupIds")
    if asked.efa and not groups.strip(", "):
        return asked.refuse(
            "securityGroupIds",
            "EFA needs a security group that lets all traffic from and to itself through, and the "
            "VPC's default need not; give the group that the nodes' EFA interfaces have",
            "SecurityGroupMissing",
        )
    return None


def _of_type(asked: _Asked, capacity_gib: int) -> Draft | None:
    deployment, storage = asked.deployment, asked.get("storageType", "SSD")
    known = sorted({tier.deployment for tier in TIERS})
    if deployment not in known:
        return asked.refuse("deploymentType", f"must be one of {', '.join(known)}")
    features = _of_features(asked, deployment)
    if features is not None:
        return features
    if storage == _INTELLIGENT_TIERING:
        return _of_tiering(asked, deployment)
    tier = next((t for t in TIERS if (t.deployment, t.storage) == (deployment, storage)), None)
    if tier is None:
        kinds = [t.storage for t in TIERS if t.deployment == deployment]
        return asked.refuse("storageType", f"must be one of {', '.join(kinds)} for {deployment}")
    if storage == "HDD" and asked.get("driveCacheType") not in _DRIVE_CACHES:
        return asked.refuse("driveCacheType", "must be NONE or READ for storage type HDD")
    return _of_size(asked, tier, capacity_gib)


def _of_features(asked: _Asked, deployment: str) -> Draft | None:
    is_newest = deployment == "PERSISTENT_2"
    link = next((name for name in _S3_LINK if asked.get(name)), None)
    if link is not None and is_newest:
        return asked.refuse(
            link,
            "PERSISTENT_2 file systems take no S3 link when they are made; remove it and link the "
            "bucket with a data repository association",
            "S3LinkUnsupported",
        )
    mode = asked.get("metadataConfigurationMode")
    if asked.efa and not (is_newest and mode):
        return asked.refuse(
            "efaEnabled",
            "EFA needs deploymentType PERSISTENT_2 and metadataConfigurationMode; set both",
            "EfaUnsupported",
        )
    version = asked.get("fileSystemTypeVersion", _EFA_VERSION)
    if asked.efa and version != _EFA_VERSION:
        return asked.refuse(
            "fileSystemTypeVersion", f"EFA needs {_EFA_VERSION}; set that", "EfaUnsupported"
        )
    return _of_metadata(asked, mode, is_newest=is_newest)


def _of_metadata(asked: _Asked, mode: str, *, is_newest: bool) -> Draft | None:
    name = "metadataConfigurationMode"
    if mode and not is_newest:
        return asked.refuse(name, "only PERSISTENT_2 has it; remove it or set deploymentType")
    if mode and mode not in _METADATA_MODES:
        return asked.refuse(name, f"must be one of {', '.join(_METADATA_MODES)}")
    iops = asked.get("metadataIops")
    if iops and mode == "AUTOMATIC":
        return asked.refuse("metadataIops", "must not be set with mode AUTOMATIC; remove it")
    if iops and iops not in map(str, _METADATA_IOPS):
        return asked.refuse("metadataIops", "must be 1500, 3000, 6000 or a multiple of 12000")
    return None


def _of_tiering(asked: _Asked, deployment: str) -> Draft | None:
    """Judge Intelligent-Tiering, whose capacity is not chosen (DRIVER)."""
    if deployment != "PERSISTENT_2":
        return asked.refuse("deploymentType", "must be PERSISTENT_2 for INTELLIGENT_TIERING")
    throughput = asked.get("throughputCapacity")
    if not re.fullmatch("[1-9][0-9]{3,8}", throughput) or int(throughput) % 4000:
        return asked.refuse("throughputCapacity", "must be a multiple of 4000 MB/s")
    return None


def _of_size(asked: _Asked, tier: Tier, capacity_gib: int) -> Draft | None:
    parameter = "perUnitStorageThroughput"
    given = asked.get(parameter, "0")
    throughput = next((t for t in tier.steps if str(t) == given), None)
    kind = f"{tier.deployment} {tier.storage}"
    if throughput is None:
        rates = ", ".join(str(t) for t in tier.steps if t)
        rule = f"must be one of {rates} MB/s/TiB for {kind}" if rates else f"{kind} has no choice"
        return asked.refuse(parameter, f"{rule}; correct it")
    step, sizes = tier.steps[throughput], tier.sizes
    if asked.efa and tier.efa_steps is not None:
        step, sizes, kind = tier.efa_steps[throughput], (), f"EFA-enabled {kind}"
    if capacity_gib in sizes or (capacity_gib > 0 and capacity_gib % step == 0):
        return None
    up = min(size for size in (*sizes, -(-capacity_gib // step) * step) if size >= capacity_gib)
    rate = f" at {throughput} MB/s/TiB" if throughput else ""
    also = f"{' or '.join(map(str, sizes))} or " if sizes else ""
    return problem(
        "CapacityInvalid",
        f"spec.volume.dynamic.capacityGiB: {capacity_gib}: must be {also}a multiple of {step} for "
        f"{kind}{rate} (StorageClass {asked.name}); use {up}",
    )
