"""Launches whose last program joins what all have made: bits, counters, and what is built."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_builds import empty, index
from ingot.codegen import select
from ingot.codegen.build import compiled
from ingot.codegen.kernel_query import Candidate, Declined, KernelQuery, Template
from ingot.codegen.lower import lower
from ingot.codegen.templates.attention import decode, grouped_query, mla
from ingot.codegen.templates.moe import gating, gating_kernels
from ingot.compiler.ir import Op
from ingot.compiler.ops.attention import cached_attention
from ingot.compiler.ops.gating import moe_gating
from ingot.compiler.ops.mla import cached_mla_attention
from ingot.compiler.target import target_of
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver, programs_in_any_order
from kernel_checks import ALL_TARGETS, ON_DEVICE, Given, Weight, graph_of_node, numpy_of
from paged_batches import batch, chunks
from pass_checks import for_target

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="the order of programs is the interpreter's")


_GATE = {"k": 4, "score": "softmax", "normalize": True, "dtype": "f32", "logits": "f32"} | {
    "eps": 1e-6,
    "post_eps": None,
    "sum_eps": 0.0,
}


@dataclass(frozen=True)
class Folded:
    """A node with its template, and the module whose kernel arrives."""

    op: Op
    template: Template
    module: ModuleType

    def only(self, folded: bool) -> Template:
        """Its candidates whose last programs join what all have made, or the others."""

        def those(query: KernelQuery) -> Iterable[Candidate | Declined]:
            answer = self.template(query)
            found = (answer,) if isinstance(answer, Candidate | Declined) else answer
            kept = [c for c in found if isinstance(c, Candidate) and bool(c.counters) == folded]
            assert kept, f"no candidate of {self.op.name}"
            return kept

        return those

    def call(self) -> tuple[list[Given], dict[str, Any]]:
        """Operands of a few tokens, and attributes."""
        if self.op is moe_gating:
            x, weight = torch.randn(3, 1100).bfloat16(), torch.randn(20, 1100).bfloat16()
            return [x, Weight(weight)], {"norm": Weight(torch.ones(1100)), **_GATE}
        places = chunks((1, 150, 2), (-1, 0, 1), (0, 63, 1), (2, 0, 1))
        given = batch(places, 16, 10)
        tokens, dtype = len(places), torch.bfloat16
        if self.op is cached_attention:
            q = torch.randn(tokens, 4, 16).to(dtype)
            caches = (given.cache(2, 16, dtype=dtype) for _ in range(2))
            return [q, *caches, *given.index], {"sinks": torch.randn(4), "scale": 0.3}
        q, q_pe = (torch.randn(tokens, 3, n).to(dtype) for n in (32, 16))
        return [q, q_pe, given.cache(48, dtype=dtype), *given.index], {"scale": 0.3}


NODES = {
    "attention": Folded(cached_attention, grouped_query.attention, decode),
    "mla": Folded(cached_mla_attention, mla.mla_attention, decode),
    "gate": Folded(moe_gating, gating.few_tokens, gating_kernels),
}


class Lowered:
    """The node as a program of one form for a target, over the same operands."""

    def __init__(self, node: Folded, folded: bool, patch: pytest.MonkeyPatch, target: str) -> None:
        torch.manual_seed(0)
        graph, weights, inputs, _ = graph_of_node(node.op, *node.call())
        patch.setattr(select, "_TABLES", ({node.op.name: (node.only(folded),)},))
        to = target_of(target)
        self.names = [f"out{i}" for i in range(len(graph.outputs))]
        self.backend = InterpretedBackend(to)
        graph = for_target(graph, to)
        made = lower(graph, weights, to, [{}], self.names, backend=self.backend)
        self.program = made.program
        self.executable = InterpretedDriver(target).load(made.program, made.load_weight)
        self.inputs = {name: numpy_of(tensor) for name, tensor in inputs.items()}

    def run(self) -> list[bytes]:
        """The bytes of all results; an AssertionError where counters are left behind."""
        found = self.executable.run(STEP, {}, self.inputs)
        return [found[name].tobytes() for name in self.names]


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest) -> Folded:
    return NODES[request.param]


@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_one_launch_gives_the_bits_of_two(
    node: Folded, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order programs arrive in, and in every replay."""
    two, one = (Lowered(node, folded, monkeypatch, target) for folded in (False, True))
    count = len(two.program.entries[0].launches)
    assert len(one.program.entries[0].launches) == count - 1
    (counters,) = (b for b in one.program.buffers.values() if b.kind == "counter")
    assert counters.nbytes and not any(b.kind == "counter" for b in two.program.buffers.values())
    expected = two.run()
    assert one.run() == expected
    for seed in range(4):
        with programs_in_any_order(seed):
            assert one.run() == expected


# ---- broken on purpose


@triton.jit
def _leaves_its_counter(arrivals, group, count):
    return tl.atomic_add(arrivals.counters + group, 1) == count - 1


@triton.jit
def _first_to_arrive(arrivals, group, count):
    before = tl.atomic_add(arrivals.counters + group, 1)
    if before == count - 1:
        tl.store(arrivals.counters + group, 0)
    return before == 0


@triton.jit
def _all_in_one_group(arrivals, group, count):
    last = tl.atomic_add(arrivals.counters, 1) == count - 1
    if last:
        tl.store(arrivals.counters, 0)
    return last


def test_counters_that_are_left_are_told(node: Folded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.module, "last_to_arrive", _leaves_its_counter)
    with pytest.raises(AssertionError, match="counter"):
        Lowered(node, True, monkeypatch, "cuda:sm_90").run()


@pytest.mark.parametrize("broken", [_first_to_arrive, _all_in_one_group])
def test_who_does_not_wait_for_its_group_is_told(
    node: Folded, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Lowered(node, False, monkeypatch, "cuda:sm_90").run()
    monkeypatch.setattr(node.module, "last_to_arrive", broken)
    with programs_in_any_order(1):
        assert Lowered(node, True, monkeypatch, "cuda:sm_90").run() != expected


# ---- what is built


def _served(node: Folded) -> tuple[list[Any], dict[str, Any]]:
    """Operands of one token at sizes that are served, without data."""
    bf16 = torch.bfloat16
    if node.op is moe_gating:
        norm = Weight(empty(bf16, 2048))
        return [empty(bf16, 1, 2048), Weight(empty(bf16, 128, 2048))], {"norm": norm, **_GATE}
    if node.op is cached_attention:
        cache = empty(bf16, 512, 64, 8, 128)
        return [empty(bf16, 1, 32, 128), cache, cache, *index(1, pages=64)], {"scale": 0.1}
    q = [empty(bf16, 1, 16, n) for n in (512, 64)]
    return [*q, empty(bf16, 512, 64, 576), *index(1, pages=64)], {"scale": 0.1}


# Stores, which waves of AMD's release, a barrier, the addition that releases and acquires, and its
# result through shared memory and another barrier.
_ARRIVAL = {
    "cuda": r"""st\.global.* bar\.sync \s+ 0; .* atom\.global\.gpu\.acq_rel\.add\.u32
        .* st\.shared .* bar\.sync \s+ 0; .* ld\.global\.cg""",
    "hip": r"""(?:global|buffer)_store.* s_waitcnt \s vmcnt\(0\) \s+ buffer_wbl2 \s sc1
        \s+ s_waitcnt \s vmcnt\(0\) .* s_barrier .* global_atomic_add
        .* s_waitcnt \s vmcnt\(0\) .* buffer_inv \s sc1 .* s_barrier""",
}


@pytest.mark.parametrize("target", ALL_TARGETS)
def test_parts_are_visible_to_the_last(
    node: Folded, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_TABLES", ({node.op.name: (node.only(True),)},))
    to = target_of(target)
    graph, weights, _, _ = graph_of_node(node.op, *_served(node))
    backend = InterpretedBackend(to)
    names = [f"out{i}" for i in range(len(graph.outputs))]
    lower(for_target(graph, to), weights, to, [{}], names, backend=backend)
    source = list(backend.sources.values())[-1]
    kind = target.split(":")[0]
    text = compiled(source, to).asm["ptx" if kind == "cuda" else "amdgcn"]
    assert re.search(_ARRIVAL[kind], text, re.VERBOSE | re.DOTALL)
