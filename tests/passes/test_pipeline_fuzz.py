"""The whole pipeline over random models, against float64 interpretation of what went in."""

from __future__ import annotations

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import PassResult, run_pipeline
from ingot.compiler.weights import Weights
from ingot.passes.pipelines import causal_lm, module
from pass_checks import random_weights
from random_graphs import graphs
from random_models import models

SLOTS, TOKENS = 3, 64
# f64 throughout; sums in another order, and norms of nearly nothing, are all that may differ.
TOLERANCE = 1e-8


def compiled(graph: Graph) -> list[PassResult]:
    return run_pipeline(graph, causal_lm(max_sequences=SLOTS, max_tokens_per_sequence=TOKENS))


def served(graph: Graph, tokens: torch.Tensor, weights: Weights, slot: int) -> list[torch.Tensor]:
    """Outputs for the tokens of one sequence, prefilled in two steps, caches poisoned first."""
    size = len(tokens)
    pages = {
        name: torch.full([int(d) for d in graph.param(name).type.shape], torch.nan).double()
        for name in graph.updates
    }
    table = graph.param("page_table").type
    order = torch.randperm(SLOTS * int(table.shape[1])).int().view(SLOTS, -1)
    parts: list[tuple[torch.Tensor, ...]] = []
    cut = int(torch.randint(1, size + 1, ()))
    for start, stop in ((0, cut), (cut, size)):
        if start == stop:
            continue
        at = torch.arange(start, stop, dtype=torch.int32)
        inputs = {
            "tokens": tokens[start:stop],
            "positions": at,
            "slots": torch.full_like(at, slot),
            "page_table": order,
            "logit_rows": torch.arange(stop - start, dtype=torch.int32),
            **pages,
        }
        given_ = {p.attrs["name"]: inputs[p.attrs["name"]] for p in graph.params}
        results = interpret(graph, given_, weights)
        pages = results.updates
        parts.append(results.outputs)
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    scale = max(float(expected.abs().max()), 1e-9)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)


@given(graph=models(), size=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_random_models_serve_what_they_compute(graph: Graph, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    results = compiled(graph)
    for result in results:
        for rule in result.matches:
            event(f"{result.name}: {rule}")
    weights = random_weights(graph, seed % 1000)
    tokens = torch.randint(0, 32, (size,), dtype=torch.int32)
    whole = {"tokens": tokens, "positions": torch.arange(size, dtype=torch.int32)}
    expected = interpret(graph, whole, weights).outputs
    found = served(results[-1].graph, tokens, weights, slot=seed % SLOTS)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


@given(graph=graphs(dtype="f64", extra=False), size=st.integers(1, 9))
def test_random_graphs_mean_the_same_after_the_pipeline(graph: Graph, size: int) -> None:
    weights = random_weights(graph)
    inputs = {
        p.attrs["name"]: torch.randn(p.type.bind({"T": size}).shape, dtype=torch.float64)  # pyright: ignore
        for p in graph.params
    }
    expected = interpret(graph, inputs, weights).outputs
    found = interpret(run_pipeline(graph, module())[-1].graph, inputs, weights).outputs
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
