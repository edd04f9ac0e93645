"""Latent attention that turns its queries and appends rows, against the reference and both ways."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from attention_builds import check_spills, empty, index
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen import select
from ingot.codegen.build import build_one
from ingot.codegen.kernel_query import Candidate, Declined, KernelQuery
from ingot.codegen.lower import lower
from ingot.codegen.templates.attention import latent_attention as template
from ingot.compiler.ops.latent_attention import INDEX, latent_attention
from ingot.compiler.ops.rope import FORMS
from ingot.compiler.target import Target, target_of
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver
from kernel_checks import (
    ALL_TARGETS,
    ON_DEVICE,
    TOLERANCE,
    Strided,
    Weight,
    check_node,
    graph_of_node,
    numpy_of,
)
from paged_batches import Batch, batch, chunks

BF16 = torch.bfloat16
# Fewer programs, which have more tiles each: the interpreter runs one after the other.
SMALL = replace(target_of("cuda:sm_90"), multiprocessors=12)
Node = tuple[tuple[Any, ...], dict[str, Any]]
PLACES = [(0, 150), (2, 0), (-1, 0), (1, 67), (1, 66)]


def node(
    at: Batch,
    dtype: torch.dtype = BF16,
    sizes: tuple[int, int, int] = (3, 48, 16),
    form: str = "deinterleaved",
    rotate: bool = True,
) -> Node:
    """Arguments for a batch: `sizes` are heads, dims of c_kv and of k_pe."""
    heads, rank, pe = sizes
    tokens = len(at.slots)
    q, q_pe = (torch.randn(tokens, heads, n).to(dtype) for n in (rank, pe))
    kv, norm = torch.randn(tokens, rank + pe).to(dtype), Weight(torch.randn(rank).to(dtype))
    angles = torch.randn(tokens, pe // 2)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    named: dict[str, Any] = {"cache": at.cache(rank + pe, dtype=dtype)}
    named |= dict(zip(INDEX, at.index, strict=True))
    named |= {"eps": 1e-5, "form": form, "scale": 0.2, "rotate": rotate}
    return (Strided(q), Strided(q_pe), Strided(kv), norm, *tables), named


def lowered(given: Node, target: Target) -> tuple[Any, Any, Any, Any]:
    """What is lowered of a graph whose outputs are the attention and the cache."""
    graph, weights, inputs, plain = graph_of_node(latent_attention, *given)
    graph = replace(graph, outputs=(graph.outputs[0], graph.outputs[2]))
    backend = InterpretedBackend(target)
    low = lower(graph, weights, target, [{}], ["out", "cache"], backend=backend)
    return low, inputs, plain, backend


def run(given: Node) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    """The attention and the cache, as the reference has them, and the kernels of the node."""
    low, inputs, plain, _ = lowered(given, SMALL)
    executable = InterpretedDriver("cuda:sm_90").load(low.program, low.load_weight)
    raw = executable.run(STEP, {}, {n: numpy_of(t) for n, t in inputs.items()})
    executable.close()
    found = [torch.from_numpy(raw[n]) for n in ("out", "cache")]
    attended, _, cache = (plain if plain.is_narrow else plain.in_f64()).reference()
    for a, b in zip((attended, cache), found, strict=True):
        size = max(a.double().nan_to_num().abs().max().item(), 1e-6)
        allowed = TOLERANCE["bf16" if plain.is_narrow else "f32"] * size
        torch.testing.assert_close(b.double(), a.double(), rtol=0, atol=allowed, equal_nan=True)
    (choice,) = (c for c in low.choices if c.op.startswith("latent_attention"))
    return found, choice.kernels


def both_ways(given: Node) -> None:
    """Rows made where they attend, and by a launch, are the reference's; caches to the bit."""

    def chosen(query: KernelQuery, within: bool) -> list[Candidate | Declined]:
        found = template.latent_attention(query)
        wanted = [
            each
            for each in found
            if isinstance(each, Candidate)
            and (each.calls[0].function.__name__ != "latent_kernel") == within
        ]
        assert wanted
        return [*wanted]

    caches: list[torch.Tensor] = []
    for within in (True, False):
        only = partial(chosen, within=within)
        with patch.object(select, "_TABLES", ({"latent_attention": (only,)},)):
            (_, cache), kernels = run(given)
        assert ("latent_kernel" in kernels) != within
        caches.append(cache)
    assert torch.equal(caches[0].nan_to_num(), caches[1].nan_to_num())
    assert torch.equal(caches[0].isnan(), caches[1].isnan())


forced = pytest.mark.skipif(ON_DEVICE, reason="candidates are forced where they are not run")


@forced
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rotate", [True, False])
def test_several_slots(dtype: torch.dtype, form: str, rotate: bool) -> None:
    both_ways(node(batch(PLACES, 16, 10), dtype, (3, 48, 16), form, rotate))


@forced
@pytest.mark.parametrize(
    "places",
    [
        [(0, 0)],
        [(0, 15), (0, 16)],  # across a page, hence of two parts
        chunks((1, 60, 5), (0, 63, 2)),  # drafts that are verified, across a page
    ],
)
def test_places(places: list[tuple[int, int]]) -> None:
    both_ways(node(batch(places, 16, 8)))


@forced
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_batch(data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.tuples(st.integers(-1, 60), st.integers(1, 3)), max_size=2))
    runs = [
        (slot if start >= 0 else -1, max(start, 0), n) for slot, (start, n) in enumerate(starts)
    ]
    places = chunks(*runs, (3, data.draw(st.integers(0, 70)), 1))
    sizes = data.draw(st.sampled_from([(1, 16, 16), (5, 24, 6), (20, 32, 16)]))
    both_ways(node(batch(places, 16, 5), torch.float32, sizes, data.draw(st.sampled_from(FORMS))))


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("target", ALL_TARGETS)
def test_every_target(target: str, tokens: int) -> None:
    """Where the rows are read too, and where there are too many, a launch makes them."""
    args, named = node(batch(chunks((1, 40, tokens), (0, 9, 1)), 64, 2), BF16, (3, 512, 64))
    lowered = check_node(latent_attention, args, named, target)
    assert lowered.choices[0].kernels[0] == "latent_kernel"


def sized(tokens: int, heads: int) -> Node:
    """Types alone, at the sizes of DeepSeek's."""
    query = empty(BF16, tokens, heads, 512), empty(BF16, tokens, heads, 64)
    tables = (empty(torch.float32, tokens, 32),) * 2
    args = (*query, empty(BF16, tokens, 576), Weight(empty(BF16, 512)), *tables)
    named = {"cache": empty(BF16, 1024, 64, 576)} | dict(zip(INDEX, index(tokens), strict=True))
    return args, {**named, "eps": 1e-6, "form": "deinterleaved", "scale": 0.1, "rotate": True}


@forced
@pytest.mark.parametrize("target", ALL_TARGETS)
@pytest.mark.parametrize(
    ("tokens", "heads", "within"),
    [(1, 128, True), (1, 16, True), pytest.param(2048, 128, False, marks=pytest.mark.slow)],
)
def test_built(target: str, tokens: int, heads: int, within: bool) -> None:
    """Nothing spills within the loop; one token's row is made where it attends."""
    _, _, _, backend = lowered(sized(tokens, heads), target_of(target))
    names = {s.function.__name__: s for s in backend.sources.values()}
    assert ("latent_kernel" not in names) == within
    for source in names.values():
        check_spills(build_one(source, target_of(target)), target)
