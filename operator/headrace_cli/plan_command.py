"""`headrace plan`: how long a cold load and the sharding take, what limits them, what they cost."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from headrace_cli.errors import InputInvalid, NotFound, UsageWrong
from headrace_cli.output import Number, bytes_text, output_option, seconds_text, show
from headrace_cli.sizing.hardware import (
    INSTANCES,
    MAX_CAPACITY_GIB,
    TIERS,
    Instance,
    capacity_fault,
)
from headrace_cli.sizing.model import KNOWN_MODELS, size_of
from headrace_cli.sizing.predict import (
    FileSystem,
    Node,
    Prediction,
    capacity_within,
    predict_load,
    predict_shard,
)
from headrace_cli.sizing.published import ROWS, TOLERANCE

_MAX_CONFIG_BYTES = 16 << 20
_GB_PER_GIB = (1 << 30) / 1e9
_HOURS = 3600.0
_PRICE = Number(1e6)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be predicted, with every default filled in."""

    model: str
    total_bytes: int
    instance: str
    gpus: int
    nics: int
    nic_gbps: float
    capacity_gib: int
    tier: int
    efa: bool
    replicas: int
    warm: bool
    shard_cores: int
    shard_gbps: float
    node_price: float | None
    storage_price: float | None
    within: float | None


@click.command(short_help="Predict load time, shard time and cost.")
@click.option("--model", help=f"A known model: {', '.join(KNOWN_MODELS)}.")
@click.option("--config", type=click.Path(path_type=Path), help="A model's config.json.")
@click.option("--model-gb", type=Number(1e6), help="Weights in GB.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32", "fp8"]),
    default="auto",
    show_default=True,
    help="Type of the weights, with --config.",
)
@click.option(
    "--instance", type=click.Choice(list(INSTANCES)), default="p5en.48xlarge", show_default=True
)
@click.option("--gpus", type=click.IntRange(1, 1024), help="GPUs of one replica (the instance's).")
@click.option("--nics", type=click.IntRange(1, 64), help="EFA devices in use (the instance's).")
@click.option(
    "--capacity-gib", type=click.IntRange(1, MAX_CAPACITY_GIB), default=96000, show_default=True
)
@click.option(
    "--tier",
    type=click.Choice([str(tier) for tier in TIERS]),
    default="1000",
    show_default=True,
    help="Throughput of the file system, MB/s per TiB.",
)
@click.option("--efa/--no-efa", default=True, show_default=True, help="Rules of EFA file systems.")
@click.option("--replicas", type=click.IntRange(1, 10000), default=1, show_default=True)
@click.option("--warm", is_flag=True, help="The file servers have the checkpoint in memory.")
@click.option("--shard-cores", type=click.IntRange(1, 1024), default=4, show_default=True)
@click.option(
    "--shard-gbps",
    type=Number(10000),
    default=100,
    show_default=True,
    help="Network of the node that shards.",
)
@click.option("--node-price", type=_PRICE, help="$ per hour of the instance.")
@click.option("--storage-price", type=_PRICE, help="$ per GB-month of the file system.")
@click.option("--within", type=Number(86400), help="Also: the capacity for a load of so many s.")
@click.option("--published", is_flag=True, help="Compare with what AWS published, and end.")
@output_option
def command(output: str, published: bool, **options: object) -> None:
    """Predict a cold load of a model from FSx for Lustre by GPUDirect Storage.

    A prediction, not a measurement: its two constants are fitted to four published loads
    (--published shows how well). Rates are those that AWS provisions.
    """
    if published:
        show(_published(), output, _draw_published)
        return
    inputs = _inputs(options)
    document = predict(inputs)
    show(document, output, lambda console: _draw(console, inputs, document))


def predict(inputs: Inputs) -> dict[str, Any]:
    """Return the prediction as the document of --output json: seconds, bytes/s, $."""
    storage = FileSystem(inputs.capacity_gib, inputs.tier)
    pcie = INSTANCES[inputs.instance].pcie
    node = Node(inputs.gpus, inputs.nics, inputs.nic_gbps, pcie)
    load = predict_load(
        inputs.total_bytes, storage, node, replicas=inputs.replicas, warm=inputs.warm
    )
    shard = predict_shard(
        inputs.total_bytes, storage, cores=inputs.shard_cores, network_gbps=inputs.shard_gbps
    )
    return {
        "inputs": asdict(inputs),
        "load": _prediction(load),
        "shard": _prediction(shard),
        "cost": _cost(inputs, load),
        "fits": _fits(inputs),
        "capacityGiBWithin": _capacity_within(inputs, node),
    }


def _inputs(options: Mapping[str, Any]) -> Inputs:
    name, total_bytes = _model(options)
    if not total_bytes:
        raise InputInvalid(f"{name}: has no weights; give a model's config.json, or its size")
    capacity, tier, efa = options["capacity_gib"], int(options["tier"]), options["efa"]
    fault = capacity_fault(capacity, tier, efa=efa)
    if fault is not None:
        raise UsageWrong(f"--capacity-gib {capacity}: {fault}")
    instance = options["instance"]
    kind = INSTANCES[instance]
    _at_most("--gpus", options["gpus"], kind.gpus, instance)
    _at_most("--nics", options["nics"], kind.nics, instance)
    return Inputs(
        model=name,
        total_bytes=total_bytes,
        instance=instance,
        gpus=options["gpus"] or kind.gpus,
        nics=options["nics"] or kind.nics,
        nic_gbps=kind.nic_gbps,
        capacity_gib=capacity,
        tier=tier,
        efa=efa,
        replicas=options["replicas"],
        warm=options["warm"],
        shard_cores=options["shard_cores"],
        shard_gbps=options["shard_gbps"],
        node_price=options["node_price"] or kind.price,
        storage_price=options["storage_price"] or TIERS[tier].price,
        within=options["within"],
    )


def _at_most(option: str, value: int | None, most: int, instance: str) -> None:
    if value is not None and value > most:
        raise UsageWrong(f"{option} {value}: {instance} has {most}; use at most that many")


def _model(options: Mapping[str, Any]) -> tuple[str, int]:
    model, config, model_gb = (options[name] for name in ("model", "config", "model_gb"))
    if [model, config, model_gb].count(None) != 2:
        raise UsageWrong("give one of --model, --config and --model-gb")
    if model_gb is not None:
        return f"{model_gb:g} GB", round(model_gb * 1e9)
    if config is not None:
        return str(config), size_of(_read(config), options["dtype"]).total_bytes
    if model not in KNOWN_MODELS:
        raise NotFound(
            f"--model {model}: is not known; use one of {', '.join(KNOWN_MODELS)}, --config with "
            "its config.json or --model-gb"
        )
    return model, KNOWN_MODELS[model]


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES)
    except OSError as error:
        raise NotFound(f"--config {path}: {error.strerror}") from None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise InputInvalid(f"--config {path}: is no JSON document") from None
    if not isinstance(values, dict):
        raise InputInvalid(f"--config {path}: must be a JSON object")
    inner = values.get("text_config")
    return {**values, **inner} if isinstance(inner, dict) else values


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {
        "seconds": round(prediction.seconds, 3),
        "bytesPerSecond": round(prediction.bytes_per_second),
        "bottleneck": prediction.bottleneck.name,
        "limits": [asdict(limit) for limit in prediction.limits],
    }


def _cost(inputs: Inputs, load: Prediction) -> dict[str, float | None]:
    gb = inputs.capacity_gib * _GB_PER_GIB
    node, storage = inputs.node_price, inputs.storage_price
    waiting = None if node is None else node / _HOURS * load.seconds * inputs.replicas
    return {
        "idleGpusPerColdStart": None if waiting is None else round(waiting, 4),
        "fileSystemPerMonth": None if storage is None else round(storage * gb, 2),
    }


def _capacity_within(inputs: Inputs, node: Node) -> int | None:
    if inputs.within is None:
        return None
    found = capacity_within(
        inputs.total_bytes, inputs.within, inputs.tier, node, replicas=inputs.replicas
    )
    if found is None or found > MAX_CAPACITY_GIB:
        raise UsageWrong(
            f"--within {inputs.within:g}: no file system is that fast for this model and node; "
            "allow more time, or use more GPUs and network cards"
        )
    return found


def _fits(inputs: Inputs) -> dict[str, Any]:
    kind: Instance = INSTANCES[inputs.instance]
    per_gpu = inputs.total_bytes / inputs.gpus
    return {
        "bytesPerGpu": round(per_gpu),
        "gpuBytes": kind.gpu_bytes,
        "fitsInGpuMemory": per_gpu < kind.gpu_bytes,
        "fitsOnVolume": inputs.total_bytes < inputs.capacity_gib * (1 << 30),
    }


def _draw(console: Console, inputs: Inputs, document: dict[str, Any]) -> None:
    console.print(
        f"[bold]{inputs.model}[/]: {bytes_text(inputs.total_bytes)} to {inputs.gpus} "
        f"{INSTANCES[inputs.instance].gpu} of {inputs.replicas} x {inputs.instance}, from "
        f"{inputs.capacity_gib} GiB at {inputs.tier} MB/s/TiB"
    )
    for name, title in (("load", "cold load"), ("shard", "sharding, once")):
        found = document[name]
        rate = bytes_text(found["bytesPerSecond"])
        console.print(
            f"\n[bold]{title}: {seconds_text(found['seconds'])}[/] ({rate}/s); "
            f"limited by: {found['bottleneck']}"
        )
        table = Table("limit", "rate", "time", box=None, pad_edge=False)
        for limit in found["limits"]:
            rate = f"{bytes_text(limit['bytes_per_second'])}/s"
            table.add_row(limit["name"], rate, seconds_text(limit["seconds"]))
        console.print(table)
    console.print()
    if inputs.within is not None:
        console.print(f"within {inputs.within:g} s: {document['capacityGiBWithin']} GiB")
    _draw_cost(console, document["cost"])
    _draw_fit(console, document["fits"])


def _draw_cost(console: Console, cost: dict[str, float | None]) -> None:
    idle, month = cost["idleGpusPerColdStart"], cost["fileSystemPerMonth"]
    console.print(
        "GPUs that wait for a cold start: "
        + ("unknown; give --node-price" if idle is None else f"${idle:.2f}")
    )
    console.print(
        "file system, each month: "
        + ("unknown; give --storage-price" if month is None else f"${month:,.0f}")
    )


def _draw_fit(console: Console, fits: dict[str, Any]) -> None:
    if not fits["fitsInGpuMemory"]:
        console.print(
            f"[red]The weights do not fit: {bytes_text(fits['bytesPerGpu'])} for each GPU of "
            f"{bytes_text(fits['gpuBytes'])}; use more GPUs or a smaller type[/]"
        )
    if not fits["fitsOnVolume"]:
        console.print("[red]The checkpoint does not fit on the file system[/]")


def _published() -> dict[str, Any]:
    rows = [
        {
            "case": row.case,
            "bytes": row.total_bytes,
            "publishedSeconds": row.seconds,
            "predictedSeconds": row.predicted,
            "error": row.error,
            "notPredicted": row.unpredicted or None,
        }
        for row in ROWS
    ]
    return {"tolerance": TOLERANCE, "rows": rows}


def _draw_published(console: Console) -> None:
    table = Table("AWS measured", "size", "published", "predicted", "error", box=None)
    for row in ROWS:
        predicted, error = row.predicted, row.error
        table.add_row(
            row.case,
            bytes_text(row.total_bytes),
            seconds_text(row.seconds),
            "-" if predicted is None else seconds_text(predicted),
            "-" if error is None else f"{error:+.0%}",
        )
    console.print(table)
    for reason in dict.fromkeys(row.unpredicted for row in ROWS if row.unpredicted):
        console.print(f"-: {reason}.")
