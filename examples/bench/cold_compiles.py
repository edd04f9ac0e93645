"""Compiles a model many times for a GPU, each time with empty caches; prints JSON: what failed.

Kernels are built in threads, which take turns with Python's parser (`compiler/ast_lock.py`): on
Python 3.11 compiles failed now and then without. The model is by default a Llama of one layer.
No GPU is needed, nor weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from ingot.codegen.build import BuildError
from ingot.frontends.api import plan

ONE_LAYER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def cold_compile(model: Path, target: str) -> str:
    """The error of one compile whose caches, Ingot's and Triton's, are empty; "" for none."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = os.environ["TRITON_CACHE_DIR"] = folder
        try:
            report = plan(model, target=target, max_sequences=2, progress=False).report
        except BuildError as error:
            return str(error)
        assert report.kernels_built and not report.kernels_cached
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--model", type=Path, help="a directory with config.json")
    parser.add_argument("--target", default="cuda:sm_90")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(ONE_LAYER))
        started = time.perf_counter()
        model = options.model or Path(folder)
        errors = [cold_compile(model, options.target) for _ in range(options.count)]
        seconds = (time.perf_counter() - started) / options.count
    facts = {
        "python": sys.version.split()[0],
        "compiles": options.count,
        "failed": [error for error in errors if error],
        "seconds_each": round(seconds, 1),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
