"""Regions of element-wise ops: their launches, in which order, and what they compute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen.build import build_one
from ingot.codegen.kernel_backend import NoKernelError
from ingot.codegen.kernel_query import Candidate, KernelQuery, Operand
from ingot.codegen.lower import lower
from ingot.codegen.pointwise import pointwise
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import Graph
from ingot.compiler.ops.aten import aten_op
from ingot.compiler.ops.leaf import param
from ingot.compiler.ops.pointwise import neg
from ingot.compiler.target import target_of
from ingot.compiler.text import parse
from ingot.compiler.types import TensorType
from ingot.compiler.weights import Weights
from ingot.runtime.program import STEP
from interpreted import InterpretedBackend, InterpretedDriver
from kernel_checks import ALL_TARGETS
from pass_checks import for_target
from random_regions import dags
from triton.backends.compiler import GPUTarget


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def lowered_graph(text: str, binding: dict[str, int], target: str = "cuda:sm_90") -> Any:
    graph = parse(text)
    outputs = [f"out{i}" for i in range(len(graph.outputs))]
    chosen = target_of(target)
    backend = InterpretedBackend(chosen)
    fused = for_target(graph, chosen)
    lowered = lower(fused, Weights({}), chosen, [binding], outputs, backend=backend)
    return graph, lowered, backend


def labels(lowered: Any) -> list[str]:
    (entry,) = lowered.program.entries
    return [launch.label for launch in entry.launches if not launch.label.startswith("copy")]


def agree(graph: Graph, lowered: Any, inputs: dict[str, torch.Tensor]) -> None:
    """The program computes bit for bit what the interpreter does."""
    executable = InterpretedDriver("cuda:sm_90").load(lowered.program, lowered.load_weight)
    (entry,) = lowered.program.entries
    found = executable.run(STEP, entry.symbols, inputs)
    expected = interpret(graph, inputs, Weights({})).outputs
    for i, value in enumerate(expected):
        narrow = value.dtype in (torch.bfloat16, torch.float16)
        a, b = torch.from_numpy(found[f"out{i}"]), value.float() if narrow else value
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


CHAIN = """
graph @chain(%x: bf16[T, 40], %w: bf16[40], %c: bf16[T, 1]) T=1..64 {
  %0 = mul(%x, %c) : bf16[T, 40]
  %1 = add(%0, %w) : bf16[T, 40]
  %2 = mul(%1, bf16(0.3)) : bf16[T, 40]
  %3 = relu(%2) : bf16[T, 40]
  %4 = sub(%3, %0) : bf16[T, 40]
  %5 = gt(%4, bf16(0.1)) : bool[T, 40]
  %6 = where(%5, %4, %1) : bf16[T, 40]
  %7 = cast(%6, dtype='f32') : f32[T, 40]
  return %7, %3
}
"""


def test_a_chain_is_one_launch_that_rounds_at_every_step() -> None:
    graph, lowered, _ = lowered_graph(CHAIN, {"T": 5})
    assert labels(lowered) == ["mul+add+mul+relu+sub+gt+where+cast"]
    shapes = {"x": (5, 40), "w": (40,), "c": (5, 1)}
    agree(graph, lowered, {n: draw(*s, dtype=torch.bfloat16) for n, s in shapes.items()})


def test_buckets_share_a_region() -> None:
    graph = parse(CHAIN)
    backend = InterpretedBackend(target_of("cuda:sm_90"))
    bindings = [{"T": t} for t in (2, 6, 64)]
    fused = for_target(graph, backend.target)
    lower(fused, Weights({}), backend.target, bindings, ("a", "b"), backend=backend)
    names = [s.function.__name__ for s in backend.sources.values()]
    assert names.count("pointwise_mul_add_mul_and_5") == 1


@pytest.mark.parametrize(("step", "casts"), [(2**28, 0), (2**30, 2)])
def test_what_lies_far_apart_is_found_in_64_bits(step: int, casts: int) -> None:
    """Three rows of 4, `step` elements apart: with the larger step the last is past 2**31."""
    x = Operand(TensorType("f32", (3, 4)), (step, 1))
    y = Operand(TensorType("f32", (3, 4)), (4, 1))
    chosen = pointwise(KernelQuery(neg, {}, (x,), (y,), target_of("cuda:sm_90")))
    assert isinstance(chosen, Candidate)
    assert chosen.calls[0].function.generated.count(".to(tl.int64)") == casts


# %1 waits for a product of %0 and is added to it: add and exp may not become one launch.
DETOUR = """
graph @detour(%x: f32[T, 8]) T=1..64 {
  %0 = neg(%x) : f32[T, 8]
  %1 = softmax(%0, dim=-1) : f32[T, 8]
  %2 = add(%0, %1) : f32[T, 8]
  %3 = mul(%2, %0) : f32[T, 8]
  return %3
}
"""


def test_a_region_that_would_wait_for_itself_is_not_made() -> None:
    _, lowered, _ = lowered_graph(DETOUR, {"T": 3})
    assert labels(lowered) == ["neg", "softmax", "add+mul"]


# An outside user of the region's first step comes before its last.
EARLY = """
graph @early(%x: f32[T, 8], %y: f32[T, 8]) T=1..64 {
  %0 = neg(%x) : f32[T, 8]
  %1 = softmax(%0, dim=-1) : f32[T, 8]
  %2 = mul(%0, %y) : f32[T, 8]
  return %1, %2
}
"""


def test_what_a_region_makes_is_there_for_all_who_use_it() -> None:
    graph, lowered, _ = lowered_graph(EARLY, {"T": 3})
    assert labels(lowered) == ["neg+mul", "softmax"]
    (entry,) = lowered.program.entries
    kinds = Counter(b.kind for b in entry.buffers)
    assert kinds == {"input": 2, "scratch": 1, "output": 2}
    executable = InterpretedDriver("cuda:sm_90").load(lowered.program, lowered.load_weight)
    inputs = {n: draw(3, 8) for n in "xy"}
    found = executable.run(STEP, entry.symbols, inputs)
    expected = interpret(graph, inputs, Weights({})).outputs
    for i, value in enumerate(expected):
        torch.testing.assert_close(torch.from_numpy(found[f"out{i}"]), value)


def test_a_long_chain_is_cut() -> None:
    steps = "\n".join(f"  %{i + 1} = neg(%{i}) : f32[T]" for i in range(40))
    text = f"graph @long(%x: f32[T]) T=1..64 {{\n  %0 = abs(%x) : f32[T]\n{steps}\n  return %40\n}}"
    _, lowered, _ = lowered_graph(text, {"T": 3})
    assert [label.count("+") + 1 for label in labels(lowered)] == [16, 16, 9]


@given(dags(), st.sampled_from((1, 2, 5)), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_dag_computes_what_its_ops_do(graph: Graph, tokens: int, seed: int) -> None:
    chosen = target_of("cuda:sm_90")
    outputs = [f"out{i}" for i in range(len(graph.outputs))]
    backend = InterpretedBackend(chosen)
    fused = for_target(graph, chosen)
    lowered = lower(fused, Weights({}), chosen, [{"T": tokens}], outputs, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        p.attrs["name"]: random_tensor(p.type.bind({"T": tokens}), generator) for p in graph.params
    }
    agree(graph, lowered, inputs)


def test_equal_regions_are_one_kernel() -> None:
    layer = "  %{1} = mul(%{0}, %{0}) : f32[T, 8]\n  %{2} = exp(%{1}) : f32[T, 8]\n"
    layer += "  %{3} = softmax(%{2}, dim=-1) : f32[T, 8]\n"
    body = "".join(layer.format(*range(3 * i, 3 * i + 4)) for i in range(3))
    text = f"graph @g(%x: f32[T, 8]) T=1..64 {{\n  %0 = neg(%x) : f32[T, 8]\n  %1{body[4:]}"
    text += "  return %9\n}"
    _, lowered, backend = lowered_graph(text, {"T": 3})
    names = sorted(s.function.__name__ for s in backend.sources.values())
    assert labels(lowered)[1::2] == ["softmax"] * 3
    assert names == [
        "pointwise_mul_exp",
        "pointwise_neg_mul_exp",
        "softmax_kernel",
    ]


BUILT = """
graph @built(%x: bf16[T, 64], %y: f32[T, 64], %i: i64[T, 64], %d: f64[T, 64]) T=1..64 {
  %0 = gelu(%x, approximate='none') : bf16[T, 64]
  %1 = gelu(%0, approximate='tanh') : bf16[T, 64]
  %2 = glu(%0, %1, activation='clamped_swiglu', alpha=1.7, limit=7.0) : bf16[T, 64]
  %3 = cast(%2, dtype='f32') : f32[T, 64]
  %4 = pow(%3, %y) : f32[T, 64]
  %5 = div(%4, %y) : f32[T, 64]
  %6 = sqrt(%5) : f32[T, 64]
  %7 = clamp(%6, min=0.0, max=inf) : f32[T, 64]
  %8 = maximum(%7, f32(-inf)) : f32[T, 64]
  %9 = gt(%8, f32(0.5)) : bool[T, 64]
  %10 = cast(%8, dtype='i64') : i64[T, 64]
  %11 = pow(%10, %i) : i64[T, 64]
  %12 = eq(%11, i64(3)) : bool[T, 64]
  %13 = logical_or(%9, %12) : bool[T, 64]
  %14 = cast(%d, dtype='f16') : f16[T, 64]
  %15 = div(%d, %d) : f64[T, 64]
  %16 = sin(%14) : f16[T, 64]
  return %13, %15, %16
}
"""


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_they_build(name: str) -> None:
    _, _, backend = lowered_graph(BUILT, {"T": 5}, name)
    for source in backend.sources.values():
        facts = build_one(source, target_of(name)).facts
        assert name.startswith("cuda") or facts["spills"] == 0


def test_vectors_are_loaded_where_rows_allow_it() -> None:
    """A chain over dense bf16 rows moves 16 bytes a thread and instruction."""
    _, _, backend = lowered_graph(CHAIN, {"T": 8}, "cuda:sm_90")
    source = next(s for s in backend.sources.values() if "and" in s.function.__name__)
    gpu = GPUTarget("cuda", 90, 32)
    options = {"num_warps": source.num_warps}
    text = triton.compile(source.ast_source(), target=gpu, options=options).asm["ptx"]
    assert "ld.global.v4.b32" in text or "v8.b32" in text
    assert "st.global.v4.b32" in text


def test_an_op_that_kernels_do_not_know_is_refused_by_its_source() -> None:
    x = param(name="x", type=TensorType("f32", (4,)))
    op = aten_op("aten.atan.default")
    value = op.node((x,), {}, "model.layers.0 @model.py:7").results[0]
    graph = Graph("g", (x,), (value,))
    chosen = target_of("cuda:sm_90")
    with pytest.raises(NoKernelError, match=r"model\.py:7: no kernel for aten\.atan.*f32\[4\]"):
        lower(graph, Weights({}), chosen, [{}], ("y",), backend=InterpretedBackend(chosen))
