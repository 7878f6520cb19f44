"""A stock vLLM: python serve.py MODEL LOAD_FORMAT GPU_MEMORY_UTILIZATION. See engine_process.py.

SERVE_OPTIONS, JSON in the environment, adds arguments of vllm.LLM, which runs eagerly without them.

READY: the number of KV cache blocks. ANSWER: greedy tokens for a fixed prompt.
"""

import json
import os
import sys

from vllm import LLM, SamplingParams

PROMPT = [58, 7, 19, 33]

if __name__ == "__main__":
    model, load_format, utilization = sys.argv[1:]
    engine = LLM(
        model=model,
        load_format=load_format,
        gpu_memory_utilization=float(utilization),
        max_model_len=256,
        **json.loads(os.environ.get("SERVE_OPTIONS", '{"enforce_eager": true}')),
    )
    blocks = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
    print(f"READY {json.dumps({'blocks': blocks})}", flush=True)
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    for _ in sys.stdin:
        output = engine.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
        print(f"ANSWER {json.dumps(list(output[0].outputs[0].token_ids))}", flush=True)
