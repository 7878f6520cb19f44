"""A stock SGLang: python serve_sglang.py MODEL LOAD_FORMAT. See engine_process.py.

SERVE_OPTIONS, JSON in the environment, has further arguments of sglang.Engine.

READY: nothing. ANSWER: greedy tokens for fixed prompts, one after the other and as one batch.
"""

import json
import os
import sys

PROMPTS = [[58, 7, 19, 33], [1, 2, 3], [99, 98, 97, 96, 95, 94]]

if __name__ == "__main__":  # its processes import this file again
    from sglang import Engine

    model, load_format = sys.argv[1:]
    engine = Engine(
        model_path=model,
        load_format=load_format,
        skip_tokenizer_init=True,
        grammar_backend="none",
        context_length=256,
        log_level="info",
        **json.loads(os.environ["SERVE_OPTIONS"]),
    )
    print("READY {}", flush=True)
    sampling = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    for _ in sys.stdin:
        batches = [*([prompt] for prompt in PROMPTS), PROMPTS]
        answers = [
            answer["output_ids"]
            for batch in batches
            for answer in engine.generate(input_ids=batch, sampling_params=sampling)
        ]
        print(f"ANSWER {json.dumps(answers)}", flush=True)
