"""What each process of a tensor-parallel test does; see test_tensor_parallel."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from multiprocessing.queues import Queue
from typing import Any

import ingot
import torch
import torch.distributed as dist
from ingot.codegen.lower import lower, serving_bindings
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.target import CPU
from ingot.compiler.text import parse
from ingot.compiler.weights import Weights
from ingot.passes.serving.gather_logits import GatherLogits
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from ingot.passes.transforms.shard_tensor_parallel import ShardTensorParallel
from ingot.runtime.devices.collectives import ProcessGroup
from ingot.runtime.devices.cpu import CpuDriver
from ingot.runtime.serving.session import Session
from safetensors.torch import load_file
from tiny_models import tiny_model

PROMPTS = ((5, 9, 77, 3), (64, 1, 30), (120, 119, 118, 7, 8, 9, 10, 11, 12))
NEW_TOKENS = 12
SEQUENCES, TOKENS = 2, 64
LIMITS: dict[str, Any] = dict(
    max_sequences=SEQUENCES, max_tokens_per_sequence=TOKENS, progress=False
)
# By name of a model: the text of its graph, and the file that holds its weights.
Models = Mapping[str, tuple[str, str]]


def tokens(models: Models, ranks: int) -> dict[str, list[list[int]]]:
    """Greedy tokens of every prompt (more of them than slots), by name of the model."""
    return {name: _served(*model, ranks) for name, model in models.items()}


def _served(text: str, weights: str, ranks: int) -> list[list[int]]:
    group = ProcessGroup(ranks) if ranks > 1 else None
    cache = InsertKvCache(SEQUENCES, TOKENS)
    split = (ShardTensorParallel(ranks, group.rank),) if group else ()
    final = run_pipeline(parse(text), (*split, cache, GatherLogits()))[-1].graph
    meta = {
        "vocab_size": final.outputs[0].type.shape[1],
        "page_size": cache.page_size,
        "max_sequences": SEQUENCES,
        "max_tokens_per_sequence": TOKENS,
        "pages": SEQUENCES * cache.pages_per_slot,
    }
    bindings = serving_bindings(SEQUENCES, TOKENS)
    store = Weights.of(load_file(weights))
    lowered = lower(final, store, CPU, bindings, ["logits"], meta, communicator=group)
    with Session(lowered.program, CpuDriver(), lowered.load_weight) as session:
        running = [session.submit(p, max_new_tokens=NEW_TOKENS) for p in PROMPTS]
        while not session.idle:
            session.step()
        return [sequence.tokens for sequence in running]


def compiled(ranks: int) -> tuple[list[list[int]], list[list[int]]]:
    """Through the front door: greedy tokens, and two runs of sampling that fixes no seed."""
    with ingot.compile(tiny_model("llama"), tensor_parallel=ranks, **LIMITS) as model:
        greedy = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
        drawn = [model.generate([3, 4], max_new_tokens=24, temperature=5.0) for _ in range(2)]
    return [c.tokens for c in greedy], [c.tokens for c in drawn]


def refused(ranks: int) -> list[str]:
    """What is said to a group of another size, and to ranks with other options."""
    said: list[str] = []
    for options in (
        {"tensor_parallel": ranks + 1},
        {"tensor_parallel": ranks, "max_sequences": 2 + dist.get_rank()},
    ):
        try:
            ingot.compile(tiny_model("llama"), **{**LIMITS, **options})
        except RuntimeError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def work(
    rank: int, ranks: int, meeting: str, queue: Queue, job: Callable[..., Any], args: tuple
) -> None:
    """One rank: join the others, do the job, hand in what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        queue.put((rank, job(*args, ranks)))
    finally:
        dist.destroy_process_group()
