"""The peer: the same config in transformers, bf16, random weights, not compiled; prints JSON.

python decode_transformers.py CONFIG_DIRECTORY PROMPT_TOKENS NEW_TOKENS
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    directory, prompt_tokens, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval()

    def decode(count: int) -> float:
        """Tokens a second after the first."""
        ids = torch.randint(config.vocab_size, (1, prompt_tokens), device="cuda")
        out = model(ids, use_cache=True)
        torch.cuda.synchronize()
        begin = perf_counter()
        for _ in range(count):
            ids = out.logits[:, -1:].argmax(-1)
            out = model(ids, past_key_values=out.past_key_values, use_cache=True)
            int(ids)  # as generate does: the token comes to the host
        torch.cuda.synchronize()
        return count / (perf_counter() - begin)

    decode(4)
    print(json.dumps({"tokens_per_second": decode(new_tokens)}))


if __name__ == "__main__":
    main()
