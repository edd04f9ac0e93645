"""Serve one model from several processes, each of which holds a share of its weights.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL "Once upon a time"

MODEL is a Hugging Face directory. Every process compiles its own rank's graph and makes the same
calls; every one gets the same tokens, and the first of them prints.
"""

from __future__ import annotations

import argparse
import os
import sys

import ingot
import torch
import torch.distributed as dist


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a Hugging Face directory: config.json and safetensors")
    parser.add_argument("prompt", nargs="+")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens-per-sequence", type=int, default=2048)
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        print(
            f"{parser.prog}: start it with: torchrun --nproc-per-node 2 {sys.argv[0]} ...",
            file=sys.stderr,
        )
        return 2
    dist.init_process_group("gloo")
    try:
        run(options, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
    return 0


def run(options: argparse.Namespace, rank: int, ranks: int) -> None:
    # Processes of one machine share its cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    model = ingot.compile(
        options.model,
        tensor_parallel=ranks,
        max_tokens_per_sequence=options.max_tokens_per_sequence,
        progress=rank == 0,
    )
    mib = [0.0] * ranks
    dist.all_gather_object(mib, model.report.weight_bytes / 2**20)
    if rank == 0:
        shares = " + ".join(f"{share:.1f}" for share in mib)
        split = next(p for p in model.report.passes if p.name == "shard-tensor-parallel")
        print(f"{model.report.model_type} over {ranks} ranks, weights {shares} MiB")
        print(", ".join(f"{name} {count}" for name, count in sorted(split.matches.items())))
        print(f"{len(split.declined)} products are whole on every rank\n")
    many = len(options.prompt) > 1
    for event in model.generate(
        options.prompt,
        max_new_tokens=options.tokens,
        temperature=options.temperature,
        stream=True,
    ):
        if rank != 0:
            continue
        if many:  # events of several prompts come mixed
            print(f"[{event.index}] {event.text!r}", flush=True)
        else:
            print(event.text, end="", flush=True)
    if rank == 0:
        print()
        stats = model.session.stats
        print(f"{stats.sequences} sequences, {stats.steps} steps", file=sys.stderr)
    model.close()


if __name__ == "__main__":
    sys.exit(main())
