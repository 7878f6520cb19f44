"""What vLLM itself makes of models: a script run in a process of its own.

    python vllm_truth.py REQUEST_JSON

The request has "make": [{"family", "fields", "out"}, ...], "save": [{"model", "out", "tp",
"pp", "ep", "dtype", "quantization", "load_format"}, ...] and "generate": [{"model",
"load_format", "quantization"}, ...].

`make` makes tiny models, see tiny_models.py. Then the script prints MADE and waits for a
line, so that its caller can cut checkpoints from them.

`save` builds each model through vLLM's own code (engine arguments, distributed state
over gloo with one forked process per rank for all models of a size, which share the
groups of ranks where these are the same, model construction,
weight loading, re-tying) and saves its state dict with vLLM's ShardedStateLoader before
weights are post-processed:
the CPU backend's post-processing replaces linear weights by packed ones. Only the engine
core, which has no part in it, is left out. On processors without AMX tiles vLLM refuses FP8 in
blocks: its kernel, which comes after all that is compared, is told that it is supported.

With "quantization" fp8_per_channel vLLM makes FP8 of an unquantized model while it loads it, and
transposes the weights for its kernels; they are saved transposed back.

`generate` answers a prompt greedily with plain vLLM and prints the token lists as JSON
after the marker TOKENS. Two things that vLLM does for each engine cost many times what the
engine does, and are of no use here: collecting garbage among millions of objects, and looking
through all modules for kernels that it replaced already.
"""

import functools
import gc
import json
import multiprocessing
import os
import sys
import tempfile
from itertools import groupby
from multiprocessing import connection
from pathlib import Path

import tiny_models
import torch
from vllm import LLM, ModelRegistry, SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_processing
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models import utils
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

PROMPT = [58, 7, 19, 33]

# vLLM leaves asking the kernel for AMX to oneDNN, which models as small as these never call.
torch.cpu._init_amx()

CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda _cls, _capability=None: (True, None))


def save_rank(jobs: list, rank: int, size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    # vLLM's worker sets it; processors with AVX-512 share memory by this name.
    os.environ["VLLM_DIST_IDENT"] = Path(rendezvous).parent.name
    with set_current_vllm_config(jobs[0][0]):
        parallel_state.init_distributed_environment(
            size, rank, f"file://{rendezvous}", rank, backend="gloo"
        )
    for (*sizes, _), group in groupby(jobs, lambda job: kind_of_groups(job[0])):
        for number, (config, out) in enumerate(group):
            with set_current_vllm_config(config):
                if number == 0:
                    parallel_state.initialize_model_parallel(*sizes)
                save_model(config, out)
        parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def kind_of_groups(config: VllmConfig) -> tuple[int, int, bool]:
    parallel = config.parallel_config
    sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    return (*sizes, config.model_config.is_moe)


def save_model(config: VllmConfig, out: str) -> None:
    # It goes by id(model), which may be that of an earlier model.
    utils._model_to_pp_missing_layer_names.clear()
    with set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        maybe_retie_word_embeddings(model, config.model_config)
        if any(parameter.is_meta for parameter in model.parameters()):
            finalize_layerwise_processing(model, config.model_config)
    transpose_back(model)
    ShardedStateLoader.save_model(model, out)


def transpose_back(model: torch.nn.Module) -> None:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "weight_scale") and weight is not None and not weight.is_contiguous():
            module.weight = torch.nn.Parameter(weight.t().contiguous(), requires_grad=False)


def engine_config(job: dict) -> VllmConfig:
    return EngineArgs(
        model=job["model"],
        tensor_parallel_size=job["tp"],
        pipeline_parallel_size=job["pp"],
        enable_expert_parallel=job["ep"] > 1,
        quantization=job["quantization"],
        load_format=job["load_format"],
        dtype=job["dtype"],
        max_model_len=128,
        enforce_eager=True,
        distributed_executor_backend="mp",
    ).create_engine_config()


def save(jobs: list[dict], size: int) -> None:
    """Save all models of one number of ranks with one set of processes."""
    for job in jobs:
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
    configured = [(engine_config(job), job["out"]) for job in jobs]
    configured.sort(key=lambda job: kind_of_groups(job[0]))
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            context.Process(
                target=save_rank, args=(configured, rank, size, f"{directory}/rendezvous")
            )
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        running = {process.sentinel: process for process in ranks}
        while running:
            for sentinel in connection.wait(running):
                process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    for waiting in running.values():
                        waiting.kill()
                    raise SystemExit(f"vLLM failed at {size} ranks")


def import_here(model: str) -> None:
    """Import the model's classes here, where vLLM would start a process to look at each."""
    config = json.loads((Path(model) / "config.json").read_text())
    for name in config["architectures"]:
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def generate(job: dict) -> list[int]:
    engine = LLM(
        model=job["model"],
        load_format=job["load_format"],
        quantization=job["quantization"],
        enforce_eager=True,
        max_model_len=128,
        num_gpu_blocks_override=16,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    output = engine.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
    return list(output[0].outputs[0].token_ids)


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    for item in request["make"]:
        tiny_models.make_model(item["family"], item["fields"], Path(item["out"]))
    sys.stdout.write("MADE\n")
    sys.stdout.flush()
    sys.stdin.readline()
    for model in {item["model"] for item in request["save"]}:
        import_here(model)
    for size in sorted({item["tp"] * item["pp"] for item in request["save"]}):
        save([item for item in request["save"] if item["tp"] * item["pp"] == size], size)
    gc.collect = lambda *_generation: 0
    current_platform.register_triton_kernel_overrides = functools.cache(
        current_platform.register_triton_kernel_overrides
    )
    answers = [generate(item) for item in request["generate"]]
    sys.stdout.write(f"TOKENS {json.dumps(answers)}\n")
