"""Asks plain vLLM, in this process, about the unsharded model; writes the answer as JSON.

python -m demo.plain_vllm --model DIR --tensor-parallel-size N --prompt TEXT --tokens N
    --output FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Generate at temperature 0 with the engine's own loader."""
    parser = argparse.ArgumentParser(description="Ask plain vLLM.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tensor-parallel-size", type=int, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    engine = LLM(
        model=options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        max_model_len=512,
        enforce_eager=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=options.tokens)
    answer = engine.generate([options.prompt], sampling)[0].outputs[0]
    options.output.write_text(
        json.dumps({"text": answer.text, "token_ids": list(answer.token_ids)})
    )


if __name__ == "__main__":
    main()
