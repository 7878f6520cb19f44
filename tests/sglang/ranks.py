"""What SGLang makes of models with its own loader and over resident weights: a script.

    python ranks.py REQUEST_JSON

The request has "make": [{"family", "fields", "out"}, ...] and "jobs": [{"name", "ranks",
"plain", "checkpoint", "socket", "changes"}, ...]. First it makes the models, see
tiny_models.py, prints MADE and waits for a line, so that its caller can cut checkpoints of them and
start loaders. Then each job is done by as many forked processes as it has ranks, over gloo: SGLang's
configuration, distributed state, model construction, loading and post-processing, with the plain
model and its own loader, and with the checkpoint and ours; "changes" are arguments of the second.
Prints a list of findings for each job, one per rank, as JSON after the marker FOUND.
"""

import json
import multiprocessing
import os
import socket
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))

import tiny_models
import torch
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.distributed import bootstrap
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.model_executor.model_runner_components.load_model_utils import build_load_config
from sglang.srt.model_loader import get_model_loader
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in the loader's memory."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if begin <= address < end:
            return "memfd:headrace" in line
    return False


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
    try:
        changes = {"model_loader_extra_config": extra} | job.get("changes", {})
        model, loader = load(job["checkpoint"], "headrace", rank, ranks, port, **changes)
    except Exception as error:  # noqa: BLE001 - any failure is a finding
        return {"error": f"{type(error).__name__}: {error}"}
    ours = model.state_dict()
    plain = load(job["plain"], "auto", rank, ranks, port)[0].state_dict() if job["plain"] else ours
    parameters = dict(model.named_parameters())
    return {
        "difference": difference(plain, ours),
        "tensors": len(ours),
        "private": [name for name, tensor in parameters.items() if not is_shared(tensor)],
        "preloaded": loader.preloaded_weights_bytes,
        "reload": refusal(model.load_weights),
        "training": model.training,
    }


def refusal(load_weights) -> str:
    try:
        load_weights(iter(()))
    except Exception as error:  # noqa: BLE001 - any failure is a finding
        return str(error)
    return ""


def work(jobs: list[dict], rank: int, port: int, results: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    results.put((rank, [compare(job, rank, port) for job in jobs]))
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
    request = json.loads(sys.argv[1])
    for item in request["make"]:
        tiny_models.make_model(item["family"], item["fields"], Path(item["out"]))
    sys.stdout.write("MADE\n")
    sys.stdout.flush()
    sys.stdin.readline()
    load_plugins()
    jobs = sorted(request["jobs"], key=lambda job: job["ranks"])
    found = {}
    for _, group in groupby(jobs, lambda job: job["ranks"]):
        of_one_size = list(group)
        names = [job["name"] for job in of_one_size]
        found |= dict(zip(names, run(of_one_size), strict=True))
    sys.stdout.write(f"FOUND {json.dumps(found)}\n")
