"""Serve one model over several ranks, each of which holds a share of its weights.

    python examples/tensor_parallel.py MODEL "Once upon a time" --ranks 2

MODEL is a Hugging Face directory. On the cpu target ranks are threads of this process.
"""

from __future__ import annotations

import argparse
import sys

import ingot


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Hugging Face directory: config.json and safetensors")
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens-per-sequence", type=int, default=2048)
    options = parser.parse_args()
    with ingot.compile(
        options.model,
        tensor_parallel=options.ranks,
        max_tokens_per_sequence=options.max_tokens_per_sequence,
    ) as model:
        mib = model.report.weight_bytes / 2**20
        print(f"{model.report.model_type} over {options.ranks} ranks, weights {mib:.1f} MiB in all")
        for split in (p for p in model.report.passes if p.name == "shard-tensor-parallel"):
            print(", ".join(f"{name} {count}" for name, count in sorted(split.matches.items())))
            print(f"{len(split.declined)} products are whole on every rank\n")
        for completion in model.generate(
            options.prompt, max_new_tokens=options.tokens, temperature=options.temperature
        ):
            print(completion.text)
        stats = model.session.stats
        print(f"{stats.sequences} sequences, {stats.steps} steps", file=sys.stderr)


if __name__ == "__main__":
    main()
