"""Appends to the cache that the launch of their rows does: what joins, and what is computed."""

from __future__ import annotations

from collections import Counter
from string import Template
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen.build import build_one
from ingot.codegen.lower import Lowered, lower
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import Graph
from ingot.compiler.ops.leaf import constant
from ingot.compiler.target import target_of
from ingot.compiler.text import parse
from ingot.compiler.torch_types import torch_dtype
from ingot.compiler.verify import verify
from ingot.compiler.weights import Weights
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver
from kernel_checks import ALL_TARGETS, ON_DEVICE
from pass_checks import for_target

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="the caches are read in host memory")

# Two slots of two pages with four places each, and a page that is nobody's.
PLACES = "%slots: i32[T], %positions: i32[T], %table: i32[2, 2]"
TABLES = "%cos: f32[T, 4], %sin: f32[T, 4]"
HEADS = f"""
graph @heads(%x: $d[T, 48], {TABLES}, {PLACES}, %kc: $cache, %vc: $cache) T=1..8 {{
  %q, %k, %v, %s = project_heads(%x, @w, norm=@norm, delta=%x, norm_1=@norm_1, cos=%cos, \
sin=%sin, heads=[4, 2, 2], dims=[8, 8, 8], rotate=[True, True, False], \
form='half', head_eps=1e-05, eps=1e-05) : $d[T, 4, 8], $d[T, 2, 8], $d[T, 2, 8], $d[T, 48]
$body
}} where {{
  @norm: $d[48]
  @norm_1: $d[8]
  @w: $d[64, 48]
}}"""
LATENT = f"""
graph @latent(%kv: $d[T, 24], {TABLES}, {PLACES}, %c: $d[5, 4, 24]) T=1..8 {{
  %row = mla_latent(%kv, @norm, %cos, %sin, eps=1e-05, form='$form') : $d[T, 24]
  %ca = kv_append(%c, %row, %slots, %positions, %table) : $d[5, 4, 24]
  return $results
  update %c = %ca
}} where {{
  @norm: $d[16]
}}"""


def graph_of(text: str, dtype: str = "f32", **parts: str) -> Graph:
    cache = f"{dtype}[5, 4, 2, 8]"
    given = {name: Template(part).substitute(cache=cache) for name, part in parts.items()}
    graph = parse(Template(text).substitute(given, d=dtype, cache=cache))
    verify(graph)
    return graph


def append(results: str = "%ka, %va", caches: str = "%kc, %vc", rows: str = "%k, %v") -> str:
    return f"  {results} = kv_append({caches}, {rows}, %slots, %positions, %table) : $cache, $cache"


UPDATES = "  update %kc = %ka\n  update %vc = %va"
SERVED = "\n".join((append(), "  return %q, %s", UPDATES))


def lowered(graph: Graph, tokens: int, target: str = "cuda:sm_90") -> tuple[Lowered, Any, Weights]:
    types = {n.attrs["name"]: n.types[0] for n in graph.nodes() if n.op is constant}
    weights = Weights.of({name: random_tensor(type_) for name, type_ in types.items()})
    chosen = target_of(target)
    backend = InterpretedBackend(chosen)
    names = [f"y{i}" for i in range(len(graph.outputs))]
    graph = for_target(graph, chosen)
    return lower(graph, weights, chosen, [{"T": tokens}], names, backend=backend), backend, weights


def launched(low: Lowered) -> Counter[str]:
    (entry,) = low.program.entries
    return Counter(launch.label.split()[0] for launch in entry.launches)


def places(tokens: int) -> dict[str, torch.Tensor]:
    """Tokens at places of their own, some of them padding, over shuffled pages."""
    slots = torch.randint(-1, 2, (tokens,))
    counts = [torch.randperm(8)[:tokens] for _ in range(2)]
    positions = torch.stack((counts[0], counts[0], counts[1]))[slots + 1, torch.arange(tokens)]
    table = torch.randperm(5)[:4].view(2, 2)
    return {"slots": slots.int(), "positions": positions.int(), "table": table.int()}


def agree(graph: Graph, tokens: int, exact: bool = False, steps: int = 2) -> Lowered:
    """Outputs and caches of the program are those of the interpreter, step after step."""
    low, _, weights = lowered(graph, tokens)
    executable = InterpretedDriver("cuda:sm_90").load(low.program, low.load_weight)
    state = {n: torch.zeros([int(d) for d in graph.param(n).type.shape]) for n in graph.updates}
    state = {n: t.to(torch_dtype(graph.param(n).type.dtype)) for n, t in state.items()}
    (entry,) = low.program.entries
    for _ in range(steps):
        inputs = {
            p.attrs["name"]: random_tensor(p.type.bind({"T": tokens}))
            for p in graph.params
            if p.attrs["name"] not in state
        } | places(tokens)
        expected = interpret(graph, {**inputs, **state}, weights)
        found = executable.run(STEP, entry.symbols, inputs)
        state = expected.updates
        pairs = [(torch.from_numpy(found[f"y{i}"]), y) for i, y in enumerate(expected.outputs)]
        for name, cache in state.items():
            raw = executable.memory[name].view(cache.dtype).view(cache.shape)
            assert torch.equal(raw == 0, cache == 0), name  # nothing else is written
            pairs.append((raw, cache))
        narrow = any(y.dtype == torch.bfloat16 for _, y in pairs)
        allowed = 0.0 if exact else 2.0**-7 if narrow else 2e-5
        for mine, best in pairs:
            torch.testing.assert_close(mine.float(), best.float(), rtol=allowed, atol=allowed)
    executable.close()
    return low


# ---- appends that join

JOINED = {"project_heads+kv_append": 3}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_go_to_the_cache_alone(dtype: str, tokens: int) -> None:
    """Three launches: prologue, product, heads; k and v are stored nowhere else."""
    graph = graph_of(HEADS, dtype, body=SERVED)
    low = agree(graph, tokens)
    assert launched(low) == JOINED
    (entry,) = low.program.entries
    assert not [b for b in entry.buffers if b.kind != "input" and b.shape == (tokens, 2, 8)]
    assert not [b for b in entry.buffers if b.shape == (5, 4, 2, 8)]
    (choice,) = low.choices
    assert choice.op == "project_heads+kv_append"
    assert choice.reason.endswith("written into the cache")


@settings(max_examples=10)
@given(tokens=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_any_tokens(tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    agree(graph_of(HEADS, body=SERVED), tokens, steps=3)


def of(*lines: str) -> str:
    return "\n".join(lines)


# Bodies of the graph, and the launches that are made of them.
BODIES: dict[str, tuple[str, dict[str, int]]] = {
    "a row is an output too": (of(append(), "  return %q, %k, %s", UPDATES), JOINED),
    "one more op reads a row": (
        of(append(), "  %n = neg(%v) : f32[T, 2, 8]", "  return %q, %n", UPDATES),
        {**JOINED, "neg": 1},
    ),
    "rows change places": (of(append(rows="%v, %k"), "  return %q", UPDATES), JOINED),
    # What is not donated is copied first.
    "the old content is an output": (
        of(append(), "  return %q, %kc", UPDATES),
        {**JOINED, "copy": 5},
    ),
    "the caches change places": (
        of(append(caches="%vc, %kc"), "  return %q", UPDATES),
        {**JOINED, "copy": 4},
    ),
    # An append that does not join is a launch of its own.
    "the rows are one": (
        of(append(rows="%k, %k"), "  return %q, %v", UPDATES),
        {"project_heads": 3, "kv_append": 1},
    ),
    "a row is computed from a result": (
        of("  %n = neg(%v) : f32[T, 2, 8]", append(rows="%k, %n"), "  return %q", UPDATES),
        {"project_heads": 3, "neg": 1, "kv_append": 1},
    ),
    "a cache is computed": (
        of(
            "  %c = add(%kc, f32(0.0)) : $cache",
            append(caches="%c, %vc"),
            "  return %q",
            UPDATES,
        ),
        {**JOINED, "add": 1, "copy": 4},
    ),
    # The caches are copied for those that are outputs, and then written in place.
    "rows are appended twice": (
        of(append(), append("%kb, %vb", rows="%v, %k"), "  return %q, %kb, %vb", UPDATES),
        {**JOINED, "kv_append": 1, "copy": 2},
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_joins(name: str) -> None:
    body, expected = BODIES[name]
    found = launched(agree(graph_of(HEADS, body=body), 4))
    assert found == expected, found


# ---- latent rows


@pytest.mark.parametrize("form", ["half", "interleaved", "deinterleaved"])
@pytest.mark.parametrize("kept", [False, True])
def test_latent_rows(form: str, kept: bool) -> None:
    graph = graph_of(LATENT, "bf16", form=form, results="%row" if kept else "%kv")
    found = launched(agree(graph, 5))
    assert found == {"mla_latent+kv_append": 1, **({} if kept else {"copy": 1})}


# ---- every target


@pytest.mark.parametrize("text", [HEADS, LATENT], ids=["heads", "latent"])
@pytest.mark.parametrize("target", ALL_TARGETS)
def test_built(text: str, target: str) -> None:
    graph = graph_of(text, "bf16", body=SERVED, form="half", results="%kv")
    _, backend, _ = lowered(graph, 8, target)
    for source in backend.sources.values():
        if source.function.__name__ in ("heads_kernel", "latent_kernel"):
            assert build_one(source, target_of(target)).facts["spills"] == 0
