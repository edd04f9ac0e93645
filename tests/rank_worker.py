"""What each process of a tensor-parallel test does; see test_tensor_parallel."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import ingot
import torch
import torch.distributed as dist
from tiny_models import tiny_model

PROMPTS = ((5, 9, 77, 3), (64, 1, 30), (120, 119, 118, 7, 8, 9, 10, 11, 12))
NEW_TOKENS = 12
LIMITS: dict[str, Any] = dict(max_sequences=2, max_tokens_per_sequence=64, progress=False)


def completions(name: str, ranks: int) -> list[list[int]]:
    """Greedy tokens of every prompt, more of them than slots."""
    with ingot.compile(tiny_model(name), tensor_parallel=ranks, **LIMITS) as model:
        found = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
        return [c.tokens for c in found]


def tokens(names: tuple[str, ...], ranks: int) -> dict[str, list[list[int]]]:
    return {name: completions(name, ranks) for name in names}


def drawn(ranks: int) -> list[list[int]]:
    """Tokens of sampling that fixes no seed: twice, which differ, but not between ranks."""
    with ingot.compile(tiny_model("llama"), tensor_parallel=ranks, **LIMITS) as model:
        runs = [model.generate([3, 4], max_new_tokens=24, temperature=5.0) for _ in range(2)]
    return [c.tokens for c in runs]


def refused(ranks: int) -> list[str]:
    """What is said to a group of another size, and to ranks with other options."""
    said: list[str] = []
    for options in (
        {"tensor_parallel": ranks + 1},
        {"tensor_parallel": ranks, "max_sequences": 2 + dist.get_rank()},
        {"tensor_parallel": ranks, "dtype": ("f32", "bf16")[dist.get_rank() % 2]},
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
