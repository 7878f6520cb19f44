"""What SGLang makes of models with its own loader and over resident weights: a script.

    python ranks.py MODELS_JSON

First it makes models, [{"family", "fields", "out"}, ...], see tiny_models.py, prints MADE and waits
for a line, so that its caller can cut checkpoints of them and start loaders. The line has the jobs,
[{"name", "ranks", "plain", "checkpoint", "socket", "changes"}, ...]. Each is done by as many forked
processes as it has ranks, over gloo: SGLang's configuration, distributed state, model construction,
loading and post-processing, with the checkpoint and our load format, and with the plain model and
its own; "changes" are arguments of the first. Without a plain model only a refusal is of interest.
Prints what each job's ranks found as JSON after the marker FOUND.
"""

import json
import multiprocessing
import os
import socket
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import tiny_models
import torch
from mapped import is_shared
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_executor.model_runner_components.load_model_utils import build_load_config
from sglang.srt.model_loader import get_model_loader
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from torch import nn

from headrace_engine import plugins, sglang_loader

SIZES = ("pp_size", "ep_size", "attn_dp_size", "moe_dp_size", "attn_cp_size", "dcp_size")


def load(model: str, load_format: str, rank: int, ranks: int, port: int, **changes):
    arguments = ServerArgs(
        model_path=model,
        load_format=load_format,
        tp_size=ranks,
        device="cpu",
        attention_backend="torch_native",
        skip_tokenizer_init=True,
        context_length=128,
        **changes,
    )
    arguments.resolve_once()
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
    initialize_moe_config()
    if not torch.distributed.is_initialized():
        bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    config = ModelConfig.from_server_args(arguments)
    loading = build_load_config(
        server_args=arguments,
        tp_rank=rank,
        remote_instance_weight_transporter_engine=None,
        remote_instance_weight_transporter_session_id="",
        draft_model_idx=None,
        weight_cache_mode="off",
        weight_cache_socket=None,
    )
    config = adjust_config_with_unaligned_cpu_tp(config, loading, ranks)
    loader = get_model_loader(loading, config)
    if load_format == "headrace":
        bootstrap.measure_pre_model_load_memory(device="cpu", is_draft_worker=False)
        assert plugins._attached, "memory is measured before the weights are resident"
    model = loader.load_model(model_config=config, device_config=DeviceConfig("cpu", rank))
    return model, loader


def difference(plain: dict, ours: dict) -> str:
    """Return the first name by which two state dicts are not the same, or nothing."""
    for name in sorted(plain.keys() | ours.keys()):
        if name not in plain or name not in ours:
            return f"{name}: one has it"
        one, other = plain[name], ours[name]
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"{name}: {one.dtype} {list(one.shape)}, {other.dtype} {list(other.shape)}"
        if not torch.equal(raw(one), raw(other)):
            return f"{name}: other values"
    return ""


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def compare(job: dict, rank: int, port: int) -> dict:
    ranks = job["ranks"]
    extra = json.dumps({"socket": job["socket"], "timeout": 60})
    plugins._attached.clear()
    try:
        changes = {"model_loader_extra_config": extra} | job["changes"]
        model, loader = load(job["checkpoint"], "headrace", rank, ranks, port, **changes)
    except Exception as error:  # noqa: BLE001 - any failure is a finding
        return {"error": f"{type(error).__name__}: {error}"}
    ours = model.state_dict()
    weights = next(iter(plugins._attached.values()))
    plain = load(job["plain"], "auto", rank, ranks, port)[0].state_dict()
    return {
        "difference": difference(plain, ours),
        "shared": sum(map(is_shared, model.parameters())),
        "private": [name for name, tensor in model.named_parameters() if not is_shared(tensor)],
        "copies": [copy.name for copy in weights.copies],
        "preloaded": [loader.preloaded_weights_bytes, weights.allocated_bytes],
        "reload": refusal(model.load_weights, iter(())),
        "training": model.training,
    }


def refusal(function, *arguments) -> str:
    try:
        function(*arguments)
    except Exception as error:  # noqa: BLE001 - any failure is a finding
        return str(error)
    return ""


def alone() -> dict:
    """What needs SGLang's configuration, and neither a model nor a loader."""
    return {
        "architectures": sorted(sglang_loader.ARCHITECTURES),
        "layouts": {flag: with_layout(flag) for flag in sglang_loader._OTHER_LAYOUTS},
        "scale": refusal(
            sglang_loader.as_sglang_names, Named({"layer.attn._k_scale": torch.tensor(0.5)})
        ),
        "parallel": {size: with_size(size) for size in SIZES},
    }


def with_layout(flag: str) -> str:
    experts, layer = nn.Module(), nn.Module()
    experts.quant_method = SimpleNamespace(**{flag: True})
    layer.experts = experts
    return refusal(sglang_loader._check_layouts, layer)


class Named(dict):
    """Weights without an attachment."""

    copies = ()


def with_size(size: str) -> str:
    """How a kind of parallelism is refused whose groups of ranks would have to be built for it."""
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        quantization=None,
        is_draft_model=False,
    )
    parallel = SimpleNamespace(**dict.fromkeys(SIZES, 1) | {size: 2})
    with mock.patch.object(sglang_loader, "get_parallel", return_value=parallel):
        return refusal(sglang_loader._check_features, config)


def work(jobs: list[dict], rank: int, port: int, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    compared = [compare(job, rank, port) for job in jobs]
    results.put((rank, [*compared, alone()]))
    results.close()
    results.join_thread()
    os._exit(0)  # SGLang's threads and gloo's have nothing left to do


def run(jobs: list[dict]) -> list[list[dict]]:
    """Do jobs of one number of ranks; returns for each job what its ranks found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results, ranks = context.Queue(), jobs[0]["ranks"]
    for rank in range(ranks):
        context.Process(target=work, args=(jobs, rank, port, results), daemon=True).start()
    found = [findings for _, findings in sorted(results.get(timeout=300) for _ in range(ranks))]
    return [list(one) for one in zip(*found, strict=True)]


if __name__ == "__main__":
    for item in json.loads(sys.argv[1]):
        tiny_models.make_model(item["family"], item["fields"], Path(item["out"]))
    load_plugins()
    assert ModelRegistry.get_supported_archs()  # imported here, once for all ranks
    sys.stdout.write("MADE\n")
    sys.stdout.flush()
    jobs = sorted(json.loads(sys.stdin.readline()), key=lambda job: job["ranks"])
    found = {}
    for _, group in groupby(jobs, lambda job: job["ranks"]):
        of_one_size = list(group)
        names = [job["name"] for job in of_one_size]
        found |= dict(zip([*names, "alone"], run(of_one_size), strict=True))
    sys.stdout.write(f"FOUND {json.dumps(found)}\n")
