"""Heads made where they attend, against the references and against a launch of their own."""

from __future__ import annotations

import re
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
from ingot.codegen.build import build_one, compiled
from ingot.codegen.kernel_query import Candidate, Declined, KernelQuery
from ingot.codegen.lower import lower
from ingot.codegen.templates.attention import project_attention as template
from ingot.compiler.ops.project_attention import project_attention
from ingot.compiler.target import Target, target_of
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver
from kernel_checks import ALL_TARGETS, ON_DEVICE, TOLERANCE, Packed, Weight, graph_of_node, numpy_of
from paged_batches import Batch, batch, chunks

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="candidates are forced where they are not run")

BF16 = torch.bfloat16
# Fewer programs, which have more tiles each: the interpreter runs one after the other.
SMALL = replace(target_of("cuda:sm_90"), multiprocessors=12)
Named = dict[str, Any]
Node = tuple[tuple[Any, ...], Named]


def node(
    at: Batch,
    dtype: torch.dtype = BF16,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    half: int = 8,
    **more: Any,
) -> Node:
    """Arguments of project_attention for a batch: x has 32 columns, RoPE turns 2 · half dims."""
    (h, g), (d, v), tokens = heads, dims, len(at.slots)
    weight = Weight((torch.randn(h * d + g * (d + v), 32) / 4).to(dtype))
    named: Named = {"heads": (h, g, g), "dims": (d, d, v), "scale": d**-0.5}
    named |= {"k_cache": at.cache(g, d, dtype=dtype), "v_cache": at.cache(g, v, dtype=dtype)}
    named |= dict(zip(("slots", "positions", "page_table"), at.index, strict=True))
    if half:
        angles = torch.randn(tokens, half)
        tables = {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
        named |= {"rotate": (True, True, False), "form": "half", **tables}
    return (torch.randn(tokens, 32).to(dtype), weight), named | more


def norms(d: int, dtype: torch.dtype = BF16, **more: Any) -> Named:
    return {f"norm_{i}": 1 + torch.randn(d).to(dtype) / 4 for i in range(2)} | {
        "head_eps": 1e-6,
        **more,
    }


def lowered(given: Node, target: Target = SMALL) -> tuple[Any, Any, Any, Any]:
    """What is lowered of a graph whose outputs are the attention and the caches."""
    graph, weights, inputs, plain = graph_of_node(project_attention, *given)
    graph = replace(graph, outputs=(graph.outputs[0], *graph.outputs[-2:]))
    backend = InterpretedBackend(target)
    low = lower(graph, weights, backend.target, [{}], ["out", "k", "v"], backend=backend)
    return low, inputs, plain, backend


def run(given: Node) -> tuple[list[torch.Tensor], Any, tuple[str, ...]]:
    """The attention and the caches, the reference, and the kernels that the node takes."""
    low, inputs, plain, _ = lowered(given)
    executable = InterpretedDriver("cuda:sm_90").load(low.program, low.load_weight)
    found = executable.run(STEP, {}, {n: numpy_of(t) for n, t in inputs.items()})
    executable.close()
    (choice,) = (c for c in low.choices if c.op.startswith("project_attention"))
    return [torch.from_numpy(found[n]) for n in ("out", "k", "v")], plain, choice.kernels


def check(given: Node, within: bool = True) -> list[torch.Tensor]:
    """Kernels compute what the reference does, heads being made where they attend or not."""
    found, plain, kernels = run(given)
    assert ("heads_kernel" in kernels) != within, kernels
    attended, *caches = (plain if plain.is_narrow else plain.in_f64()).reference()
    narrow = "bf16" if plain.is_narrow else "f32"
    for a, b in zip((attended, *caches[-2:]), found, strict=True):
        size = max(a.double().nan_to_num().abs().max().item(), 1e-6)
        allowed = TOLERANCE[narrow] * size
        torch.testing.assert_close(b.double(), a.double(), rtol=0, atol=allowed, equal_nan=True)
    return found


def alike(given: Node, joined: bool | None = None) -> None:
    """Heads made where they attend give what the reference does, and the bits that heads made by a
    launch of their own give. Parts are joined by the last program, or by a launch, or as is
    cheapest."""

    def chosen(query: KernelQuery, within: bool) -> list[Candidate | Declined]:
        wanted: list[Candidate | Declined] = []
        for each in template.project_attention(query):
            if isinstance(each, Candidate) and joined in (None, bool(each.counters)):
                names = {call.function.__name__ for call in each.calls}
                wanted += [each] if ("heads_kernel" in names) != within else []
        assert wanted
        return wanted

    results: list[list[torch.Tensor]] = []
    for within in (True, False):
        only = partial(chosen, within=within)
        with patch.object(select, "_TABLES", ({"project_attention": (only,)},)):
            results.append(check(given, within))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.isnan(), b.isnan())


PLACES = [(0, 150), (2, 0), (-1, 0), (1, 67), (1, 66)]


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2), (16, 1)])
def test_decoding_several_slots(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    check(node(batch(PLACES, 16, 10), dtype, heads))


VARIANTS: dict[str, Named] = {
    "no rotation": {"half": 0},
    "a bias": {"bias": Weight(torch.randn(128).to(BF16))},
    "interleaved": {"form": "interleaved"},
    "deinterleaved": {"form": "deinterleaved"},
    "some dims": {"half": 3, "start": 5},
    "norms of heads": {"dims": (64, 64), **norms(64)},
    "norms of rotated heads": {"dims": (64, 64), **norms(64), "norm_of": "rotated head"},
    "values of fewer dims": {"dims": (64, 16), **norms(64)},
    "wide": {"dims": (256, 256), **norms(256)},
    "a window": {"window": 70},
    "a short window": {"window": 1},
    "sinks": {"sinks": torch.randn(4)},
    "a soft cap": {"softcap": 2.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str) -> None:
    alike(node(batch(PLACES, 16, 10), **VARIANTS[name]))


@pytest.mark.parametrize("name", ["a window", "sinks"])
@pytest.mark.parametrize("joined", [True, False])
def test_parts_joined_by_the_last_program_or_a_launch(name: str, joined: bool) -> None:
    alike(node(batch(PLACES, 16, 10), **VARIANTS[name]), joined)


@pytest.mark.parametrize(
    "places",
    [
        [(0, 0)],
        [(1, 15)],
        [(1, 16)],
        [(-1, 0), (-1, 3)],
        chunks((1, 62, 5), (0, 15, 3)),
        [(0, 100), (0, 40), (0, 41), (1, 64), (0, 63)],
        chunks((0, 0, 8)),
    ],
)
@pytest.mark.parametrize("window", [0, 20])
def test_places(
    places: list[tuple[int, int]], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of one slot see one another, whatever their order; across borders of pages and parts;
    and padding alone."""
    alike(node(batch(places, 16, 8, slots=2), window=window))


@settings(max_examples=10)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    """Positions and slots at random, what was not written being NaN."""
    page_size, pages = data.draw(st.sampled_from([(16, 9), (32, 4), (64, 1)]))
    place = st.tuples(st.integers(-1, 2), st.integers(0, page_size * pages - 1))
    places = data.draw(st.lists(place, min_size=1, max_size=8, unique=True))
    heads = data.draw(st.sampled_from([(2, 2), (3, 1), (5, 1), (8, 2)]))
    at = batch(places, page_size, pages, slots=3)
    alike(node(at, heads=heads, window=data.draw(st.sampled_from([0, 0, 1, 20, 100]))))


def test_a_packed_weight_and_a_norm_of_the_input() -> None:
    (x, weight), named = node(batch(PLACES, 16, 10))
    norm = {"norm": Weight(1 + torch.randn(32).to(BF16) / 8), "eps": 1e-5}
    check(((x, Packed(weight.tensor)), {**named, **norm}))


def test_many_tokens_have_a_launch_for_their_heads() -> None:
    check(node(batch(chunks((0, 60, 9)), 16, 8)), within=False)


DECLINED: dict[str, Named] = {
    "a norm of a part": {**norms(64), "norm_of": "part", "norm_1": torch.ones(32, dtype=BF16)},
    "dims in two parts": {"dims": (24, 24)},
    "norms of few dims": norms(16),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_has_a_launch_for_its_heads(name: str) -> None:
    check(node(batch(PLACES, 16, 10), **DECLINED[name]), within=False)


def sized(heads: tuple[int, int], d: int, tokens: int, **more: Any) -> Node:
    """Types alone, at the sizes of a model."""
    (h, g), pages = heads, empty(BF16, 1024, 64, heads[1], d)
    places = dict(zip(("slots", "positions", "page_table"), index(tokens), strict=True))
    tables = {"cos": empty(BF16, tokens, d // 2), "sin": empty(BF16, tokens, d // 2)}
    named: Named = {"heads": (h, g, g), "dims": (d, d, d), "scale": 0.1, "form": "half", **places}
    named |= {"k_cache": pages, "v_cache": pages, "rotate": (True, True, False), **tables}
    weight = empty(BF16, (h + 2 * g) * d, 256)
    return (empty(BF16, tokens, 256), Weight(weight)), named | more


BUILT: dict[str, Node] = {
    "qwen3-8b": sized((32, 8), 128, 1, **norms(128)),
    "qwen3-8b of eight tokens": sized((32, 8), 128, 8, **norms(128)),
    "gpt-oss": sized((64, 8), 64, 1, window=128, sinks=torch.randn(64).to(BF16)),
    "gpt-oss of eight tokens": sized((64, 8), 64, 8, window=128, sinks=torch.randn(64).to(BF16)),
    "gemma": sized((8, 4), 256, 4, **norms(256), window=1024),
    "gemma 2": sized((8, 4), 256, 1, softcap=50.0),
    "one head each": sized((16, 16), 128, 8, **norms(128)),
}


_MORE = ("gemma 2", "gpt-oss", "qwen3-8b of eight tokens")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in _MORE else ()) for n in BUILT]
)
@pytest.mark.parametrize("target", ALL_TARGETS)
def test_built(name: str, target: str) -> None:
    _, _, _, backend = lowered(BUILT[name], target_of(target))
    names = {s.function.__name__: s for s in backend.sources.values()}
    assert "heads_kernel" not in names
    attends = names.get("register_decode_kernel") or names["decode_kernel"]
    check_spills(build_one(attends, target_of(target)), target)


def norm_sums(source: Any, target: str) -> set[tuple[str, ...]]:
    """How the dims of a head are shared out where they are added up: elements a thread, threads and
    warps along them."""
    text = compiled(source, target_of(target)).asm["ttgir"]
    field = r"(\w+) = \[\d+, (\d+)\]"
    layouts = {
        name: tuple(n for _, n in re.findall(field, body)[:3])
        for name, body in re.findall(r"(#\w+) = #ttg\.blocked<\{(.*?)\}>", text)
    }
    sums = re.findall(
        r'%scales\w* = "tt.reduce".*?: \(tensor<\d+x\d+xf32, (#\w+)>', text, re.DOTALL
    )
    return {layouts[name] for name in sums}


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-8b of eight tokens", "gemma", "one head each"])
@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_norms_add_up_in_one_order(name: str, target: str) -> None:
    """The order of sums is the same wherever a token's heads are made."""
    x, named = BUILT[name]
    sums: list[set[tuple[str, ...]]] = []
    for tokens in (len(x[0]), 16):
        (h, g, _), (d, *_) = named["heads"], named["dims"]
        given = sized((h, g), d, tokens, **norms(d))
        _, _, _, backend = lowered(given, target_of(target))
        kernels = {s.function.__name__: s for s in backend.sources.values()}
        kernel = "heads_kernel" if tokens == 16 else "decode_kernel"
        assert ("heads_kernel" in kernels) == (tokens == 16)
        sums.append(norm_sums(kernels[kernel], target))
    within, alone = sums
    assert len(alone) == 1 and within == alone
