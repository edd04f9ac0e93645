"""A token's attention in registers: statement by statement against the reference; what it takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen.build import build_one
from ingot.codegen.lower import lower
from ingot.codegen.templates.attention.decode_registers import TILE, register_decode_kernel
from ingot.compiler.ops.project_attention import project_attention
from ingot.compiler.target import target_of
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver
from kernel_checks import ON_DEVICE, TOLERANCE, Weight, graph_of_node, numpy_of
from paged_batches import batch

interpreted = pytest.mark.skipif(ON_DEVICE, reason="statement by statement, in the interpreter")

BF16 = torch.bfloat16
SMALL = replace(target_of("cuda:sm_90"), multiprocessors=6)
PAGE = 64
Named = dict[str, Any]


def node(
    at: int,
    heads: tuple[int, int] = (4, 2),
    d: int = 64,
    half: int | None = None,
    slot: int = 1,
    pages: int = 8,
    **more: Any,
) -> tuple[tuple[Any, ...], Named]:
    """Arguments of project_attention for one token of a slot at a position."""
    h, g = heads
    where = batch(((slot, at),), PAGE, pages, slots=2)
    weight = Weight((torch.randn((h + 2 * g) * d, 32) / 4).to(BF16))
    named: Named = {"heads": (h, g, g), "dims": (d, d, d), "scale": d**-0.5}
    named |= {"k_cache": where.cache(g, d, dtype=BF16), "v_cache": where.cache(g, d, dtype=BF16)}
    named |= dict(zip(("slots", "positions", "page_table"), where.index, strict=True))
    half = d // 2 if half is None else half
    if half:
        angles = torch.randn(1, half)
        tables = {"cos": angles.cos().to(BF16), "sin": angles.sin().to(BF16)}
        named |= {"rotate": (True, True, False), "form": "half", **tables}
    return (torch.randn(1, 32).to(BF16), weight), named | more


def normed(d: int, values: bool = False, **more: Any) -> Named:
    """Norms of queries and keys, and of values."""
    gains = {f"norm_{i}": Weight(1 + torch.randn(d).to(BF16) / 4) for i in range(2 + values)}
    return {**gains, "head_eps": 1e-6, **more}


def lowered(given: tuple[tuple[Any, ...], Named]) -> tuple[Any, Any, Any, Any]:
    graph, weights, inputs, plain = graph_of_node(project_attention, *given)
    graph = replace(graph, outputs=(graph.outputs[0], *graph.outputs[-2:]))
    backend = InterpretedBackend(SMALL)
    low = lower(graph, weights, SMALL, [{}], ["out", "k", "v"], backend=backend)
    return low, inputs, plain, backend


def kernels(low: Any) -> tuple[str, ...]:
    (choice,) = (c for c in low.choices if c.op.startswith("project_attention"))
    return choice.kernels


def check(given: tuple[tuple[Any, ...], Named]) -> None:
    """The attention and the caches are the reference's; a second step finds counters at rest."""
    low, inputs, plain, _ = lowered(given)
    assert "register_decode_kernel" in kernels(low)
    executable = InterpretedDriver("cuda:sm_90").load(low.program, low.load_weight)
    attended, *caches = plain.reference()
    for _ in range(2):
        found = executable.run(STEP, {}, {n: numpy_of(t) for n, t in inputs.items()})
        for name, expected in zip(("out", "k", "v"), (attended, *caches[-2:]), strict=True):
            size = max(expected.double().nan_to_num().abs().max().item(), 1e-6)
            torch.testing.assert_close(
                torch.from_numpy(found[name]).double(),
                expected.double(),
                rtol=0,
                atol=TOLERANCE["bf16"] * size,
                equal_nan=True,
            )
    executable.close()


@interpreted
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("at", [0, 1, 15, 16, TILE - 1, TILE, TILE + 1, 3 * TILE + 5, 8 * PAGE - 1])
def test_positions(at: int, d: int) -> None:
    check(node(at, d=d, **normed(d)))


@interpreted
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 1), (10, 2), (3, 3)], ids=str)
def test_groups(heads: tuple[int, int]) -> None:
    check(node(200, heads))


VARIANTS: dict[str, Named] = {
    "no rotation": {"half": 0},
    "part of a head rotated": {"half": 16, "start": 8},
    "a window": {"window": 100},
    "a window within a tile": {"window": 3},
    "sinks": {"sinks": Weight(torch.tensor([0.5, -1.0, 3.0, 0.0]).to(BF16))},
    "sinks and a window": {
        "sinks": Weight(torch.tensor([0.5, -1.0, 3.0, 0.0]).to(BF16)),
        "window": 40,
    },
    "normed after rotation": normed(64, norm_of="rotated head"),
    "values normed": normed(64, values=True),
    "a bias": {"bias": Weight(torch.linspace(-2, 2, 512).to(BF16))},
    "all": normed(64, bias=Weight(torch.linspace(-2, 2, 512).to(BF16)), window=300),
}


@interpreted
@pytest.mark.parametrize("at", [0, 130, 400])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, at: int) -> None:
    check(node(at, **VARIANTS[name]))


@interpreted
def test_padding_is_zeros_and_writes_nothing() -> None:
    check(node(0, slot=-1))


@interpreted
@settings(max_examples=15)
@given(at=st.integers(0, 511), group=st.integers(1, 8), seed=st.integers(0, 999))
def test_any_position(at: int, group: int, seed: int) -> None:
    torch.manual_seed(seed)
    check(node(at, (2 * group, 2), **normed(64)))


DECLINED: dict[str, tuple[tuple[Any, ...], Named]] = {
    "heads of 32 dims": node(5, d=32),
    "more heads to a key than eight": node(5, (9, 1)),
    "pairs beside each other": node(5, form="interleaved"),
    "a softcap": node(5, softcap=20.0),
    "norms that are no constants": node(5, norm_0=torch.ones(64).to(BF16), head_eps=1e-6),
}


@interpreted
@pytest.mark.parametrize("name", DECLINED)
def test_what_has_its_context_not_in_registers(name: str) -> None:
    low, *_ = lowered(DECLINED[name])
    assert "register_decode_kernel" not in kernels(low)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", ["cuda:sm_90", "cuda:sm_100"])
def test_size(name: str, d: int) -> None:
    """Nothing spills, and on sm_90 the registers of two programs fit on a multiprocessor."""
    target = target_of(name)
    graph, weights, _, _ = graph_of_node(project_attention, *node(5, (32, 8), d=d, **normed(d)))
    graph = replace(graph, outputs=(graph.outputs[0], *graph.outputs[-2:]))
    backend = InterpretedBackend(target)
    lower(graph, weights, target, [{}], ["out", "k", "v"], backend=backend)
    (source,) = (s for s in backend.sources.values() if s.function is register_decode_kernel)
    built = build_one(source, target)
    assert built.facts["spills"] == 0
    assert name != "cuda:sm_90" or built.facts["registers"] <= 128
    assert built.facts["mma"] == 2 * d // 16
