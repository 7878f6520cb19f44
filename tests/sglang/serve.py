"""One run of SGLang's engine, its processes included, as a stock engine is.

    python serve.py MODEL LOAD_FORMAT TENSOR_PARALLEL_SIZE

Prints greedy tokens for a fixed prompt as JSON after the marker TOKENS.
"""

import json
import sys

from sglang import Engine

PROMPT = [58, 7, 19, 33]

if __name__ == "__main__":
    model, load_format, size = sys.argv[1:]
    engine = Engine(
        model_path=model,
        load_format=load_format,
        tp_size=int(size),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        context_length=128,
        max_total_tokens=512,
        log_level="info",
    )
    sampling = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    answer = engine.generate(input_ids=PROMPT, sampling_params=sampling)
    engine.shutdown()
    sys.stdout.write(f"TOKENS {json.dumps(answer['output_ids'])}\n")
