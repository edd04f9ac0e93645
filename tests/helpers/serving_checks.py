"""What tests of fusions share: traced tiny models, and the logits of two graphs compared."""

from __future__ import annotations

from functools import cache

import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.torch_types import torch_dtype
from ingot.compiler.weights import Weights
from ingot.frontends.importers.huggingface import import_hugging_face
from ingot.passes.raising.canonicalize import Canonicalize
from ingot.passes.raising.raise_ops import RaiseOps
from ingot.passes.serving.gather_logits import GatherLogits
from ingot.passes.serving.insert_kv_cache import InsertKvCache
from shared_traces import sharing
from tiny_models import tiny_model

SLOTS, MAX_TOKENS, VOCABULARY = 2, 48, 128
# The tokens of each step as (slot, how many): prefill of both slots, a token of each, a mix, and
# padding. The last step of a slot comes after its window of 16.
STEPS = (((0, 19), (1, 6)), ((1, 1), (0, 1)), ((0, 1), (1, 5)), ((-1, 2), (1, 1)))


@cache
def traced(name: str, dtype: str = "f32", **overrides: int) -> tuple[Graph, Weights]:
    """A tiny model with its ops raised and nothing fused, and its weights."""
    model = tiny_model(name, dtype=torch_dtype(dtype), **overrides)
    with sharing():
        imported = import_hugging_face(model, dtype=torch_dtype(dtype), max_tokens=64)
    return run_pipeline(imported.graph, (Canonicalize(), RaiseOps()))[-1].graph, imported.weights


def cached(graph: Graph) -> Graph:
    """A graph of `traced` over a paged cache."""
    return run_pipeline(graph, (InsertKvCache(SLOTS, MAX_TOKENS), GatherLogits()))[-1].graph


def _drawn(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).int()


def _logits(graph: Graph, weights: Weights) -> list[torch.Tensor]:
    """Logits of one sequence."""
    count = STEPS[0][0][1]
    inputs = {"tokens": _drawn(count), "positions": torch.arange(count).int()}
    return list(interpret(graph, inputs, weights).outputs)


def _served_logits(graph: Graph, weights: Weights) -> list[torch.Tensor]:
    """Logits of every token of STEPS; what a cache holds before it is written is NaN."""
    shapes = {name: graph.param(name).type.bind({}) for name in (*graph.updates, "page_table")}
    rows, columns = map(int, shapes.pop("page_table").shape)
    pages = torch.arange(rows * columns).flip(0).view(rows, columns).int()
    state = {
        name: torch.full([int(d) for d in t.shape], torch.nan, dtype=torch_dtype(t.dtype))
        for name, t in shapes.items()
    }
    lengths = dict.fromkeys(range(SLOTS), 0)
    found: list[torch.Tensor] = []
    for step in STEPS:
        slots = torch.tensor([slot for slot, count in step for _ in range(count)]).int()
        starts = [lengths.get(slot, 0) for slot, _ in step]
        ranges = zip(starts, step, strict=True)
        inputs = {
            "tokens": _drawn(len(slots)),
            "positions": torch.cat([torch.arange(s, s + n) for s, (_, n) in ranges]).int(),
            "slots": slots,
            "page_table": pages,
            "logit_rows": (slots >= 0).nonzero().squeeze(1).int(),
        }
        results = interpret(graph, {**inputs, **state}, weights)
        state = results.updates
        found.extend(results.outputs)
        lengths |= {slot: lengths[slot] + count for slot, count in step if slot >= 0}
    return found


def assert_same_logits(
    before: Graph, after: Graph, weights: Weights, tolerance: float = 1e-4
) -> None:
    """Both graphs, cached or not, give the same logits; `tolerance` is relative to the largest."""
    run = _served_logits if before.updates else _logits
    for a, b in zip(run(before, weights), run(after, weights), strict=True):
        error = float((a - b).float().abs().max() / a.float().abs().max())
        assert error <= tolerance, f"logits differ by {error:.1e}"
