"""One engine run: a script in a process of its own, as a stock engine is.

    python serve.py MODEL LOAD_FORMAT TENSOR_PARALLEL_SIZE [DTYPE]

Prints greedy tokens for a fixed prompt as JSON after the marker TOKENS.
"""

import json
import sys

from vllm import LLM, SamplingParams

PROMPT = [58, 7, 19, 33]

if __name__ == "__main__":
    model, load_format, size, *dtype = sys.argv[1:]
    engine = LLM(
        model=model,
        load_format=load_format,
        tensor_parallel_size=int(size),
        dtype=dtype[0] if dtype else "auto",
        enforce_eager=True,
        max_model_len=128,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    output = engine.generate({"prompt_token_ids": PROMPT}, sampling, use_tqdm=False)
    sys.stdout.write(f"TOKENS {json.dumps(list(output[0].outputs[0].token_ids))}\n")
