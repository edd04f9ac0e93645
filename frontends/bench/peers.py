"""Peers: the same config in transformers on the same device, in a process of its own.

    python -m ingot.frontends.bench.peers CONFIG_DIRECTORY MODE PROMPT_TOKENS NEW_TOKENS

MODE is hf-eager (a growing cache) or hf-compile (a static cache, the decoding step compiled by
torch with CUDA graphs). Weights are random, in bf16. Prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

PEERS = ("hf-eager", "hf-compile")


def measure_peer(config: Path, mode: str, prompt: int, new: int) -> dict[str, Any]:
    """`tokens_per_second` of a peer with one sequence, and `start_seconds`, which its first run
    took; or `error`, the last line of its failure."""
    command = [sys.executable, "-m", __name__, str(config), mode, str(prompt), str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run one peer; see the module."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    directory, mode, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval()
    compiled = mode == "hf-compile"
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model

    @torch.inference_mode()
    def decode(count: int) -> float:
        """Tokens a second after the first."""
        ids = torch.randint(config.vocab_size, (1, prompt), device="cuda")
        named: dict[str, Any] = {"use_cache": True}
        if compiled:
            named["past_key_values"] = StaticCache(config=config, max_cache_len=prompt + count + 1)
        out = model(ids, **named)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        begin = perf_counter()
        for _ in range(count):
            out = step(token.clone(), past_key_values=cache, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            int(token)  # as generate does: the token comes to the host
        return count / (perf_counter() - begin)

    begin = perf_counter()
    decode(new)  # of the same length: shapes are compiled for
    started = perf_counter() - begin
    print(json.dumps({"tokens_per_second": decode(new), "start_seconds": started}))


if __name__ == "__main__":
    main()
