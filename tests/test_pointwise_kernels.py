"""Generated kernels: every element-wise op alone, and regions of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen.build import build_one
from ingot.codegen.lower import lower
from ingot.codegen.pointwise import fusible
from ingot.codegen.regions import grouped
from ingot.compiler.interpret import interpret, random_tensor
from ingot.compiler.ir import Graph, Op
from ingot.compiler.ops import pointwise as ops
from ingot.compiler.ops.glu import ACTIVATIONS, CLAMPED, glu
from ingot.compiler.ops.leaf import literal, param
from ingot.compiler.ops.reduce import amax
from ingot.compiler.ops.shape import arange, full
from ingot.compiler.target import target_of
from ingot.compiler.text import parse
from ingot.compiler.torch_types import torch_dtype
from ingot.compiler.types import TensorType, symbol
from ingot.compiler.weights import Weights
from interpreted import InterpretedBackend, InterpretedDriver
from kernel_checks import ALL_TARGETS, Strided, build_everywhere, check_node, run_node

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNARY = sorted(ops.UNARY, key=lambda op: op.name)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("op", UNARY, ids=lambda op: op.name)
def test_one_operand(op: Op, dtype: torch.dtype) -> None:
    x = draw(3, 7, dtype=dtype)
    if op.name in ("log", "sqrt", "rsqrt"):
        x = x.abs() + 0.1
    check_node(op, (x,))


@pytest.mark.parametrize("op", [*UNARY, ops.gelu, ops.clamp], ids=lambda op: op.name)
def test_the_ends_of_the_number_line(op: Op) -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 100.0, -100.0, 1e-30])
    attrs = {"gelu": {"approximate": "tanh"}, "clamp": {"min": -1.0, "max": torch.inf}}
    if op.name in ("sin", "cos", "exp"):
        x = x[[0, 1, 4, 7]]
    found, plain, _ = run_node(op, (x,), attrs.get(op.name, {}))
    (expected_,) = op.reference(*plain, **attrs.get(op.name, {}))
    torch.testing.assert_close(found[0], expected_, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gelu(approximate: str, dtype: torch.dtype) -> None:
    check_node(ops.gelu, (draw(300, dtype=dtype),), {"approximate": approximate})


@pytest.mark.parametrize("dtype", FLOATS)
def test_clamp(dtype: torch.dtype) -> None:
    check_node(ops.clamp, (draw(5, 9, dtype=dtype),), {"min": -0.5, "max": 0.25})
    check_node(ops.clamp, (draw(5, 9, dtype=dtype),), {"min": 0.0, "max": torch.inf})


KINDS = ("bool", "u8", "i8", "i16", "i32", "i64", "f16", "bf16", "f32", "f64")


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_cast(kind: str, to: str) -> None:
    x = torch.tensor([0.0, 1.0, 2.6, 5.0, 100.25, 0.1, 1e-5]).to(torch_dtype(kind))
    (found,), _, _ = run_node(ops.cast, (x,), {"dtype": to})
    assert torch.equal(found.to(torch_dtype(to)), x.to(torch_dtype(to)))


def test_cast_to_bf16_rounds_to_the_nearest_even() -> None:
    x = torch.cat([draw(300) * 10.0**e for e in (-20, 0, 20)])
    (found,), _, _ = run_node(ops.cast, (x,), {"dtype": "bf16"})
    assert torch.equal(found, x.bfloat16().float())


PAIRS = (ops.add, ops.sub, ops.mul, ops.div, ops.maximum, ops.minimum)
COMPARED = (ops.lt, ops.le, ops.gt, ops.ge, ops.eq, ops.ne)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("op", PAIRS, ids=lambda op: op.name)
def test_two_operands(op: Op, dtype: torch.dtype) -> None:
    y = draw(7, dtype=dtype)
    y = y + 2 * y.sign()
    check_node(op, (draw(3, 5, 7, dtype=dtype), y))
    check_node(op, (draw(4, 1, dtype=dtype), y))
    check_node(op, (draw(5, 7, dtype=dtype), 0.3))
    check_node(op, (0.3, y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("op", [o for o in PAIRS if o is not ops.div], ids=lambda op: op.name)
def test_integers_wrap_around(op: Op, dtype: torch.dtype) -> None:
    ends = torch.iinfo(dtype)
    x = torch.tensor([ends.max, ends.min, 3, 100], dtype=dtype)
    check_node(op, (x, torch.tensor([2, 1, 7, 100], dtype=dtype)))
    check_node(op, (x, 3))


@pytest.mark.parametrize("dtype", [torch.int32, *FLOATS])
@pytest.mark.parametrize("op", COMPARED, ids=lambda op: op.name)
def test_comparisons(op: Op, dtype: torch.dtype) -> None:
    x = torch.tensor([-1, 0, 1, 2, 2]).to(dtype)
    check_node(op, (x, torch.tensor([-1, 1, 0, 2, 3]).to(dtype)))
    check_node(op, (x, 2))


def test_a_literal_is_compared_in_the_dtype_of_the_tensor() -> None:
    x = torch.tensor([0.1, 0.2]).bfloat16()
    (found,), _, _ = run_node(ops.eq, (x, 0.1), {})
    assert torch.equal(found, ops.eq.reference(x, 0.1)[0])
    assert found.tolist() == [True, False]


@pytest.mark.parametrize("op", PAIRS[4:], ids=lambda op: op.name)
def test_nan_wins(op: Op) -> None:
    x, y = torch.tensor([torch.nan, 1.0, 2.0]), torch.tensor([1.0, torch.nan, -2.0])
    check_node(op, (x, y))
    check_node(op, (x, 1.5))


@pytest.mark.parametrize("op", [ops.add, ops.mul, ops.eq, ops.ne, ops.logical_and, ops.logical_or])
def test_bools(op: Op) -> None:
    x = torch.tensor([[True, False]] * 3)
    check_node(op, (x, torch.tensor([[True], [False], [True]])))


def test_not() -> None:
    check_node(ops.logical_not, (torch.tensor([True, False, True]),))


@pytest.mark.parametrize("exponent", [2, 3, 0.5, -0.5, -1.0, 1.7, 0.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_powers_of_floats(dtype: torch.dtype, exponent: float) -> None:
    x = draw(50, dtype=dtype).abs() + 0.1
    check_node(ops.pow_, (x, exponent))
    check_node(ops.pow_, (x, torch.full((50,), exponent).to(dtype)))


def test_powers_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, torch.inf, -torch.inf, torch.nan])
    x, y = (t.flatten().contiguous() for t in torch.meshgrid(ends, ends, indexing="ij"))
    x, y = x[~((x == 0) & (y == -1))], y[~((x == 0) & (y == -1))]
    (found,), _, _ = run_node(ops.pow_, (x, y), {})
    torch.testing.assert_close(found, x**y, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_powers_of_integers(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 2, 3, 5, 7, 11], dtype=dtype)
    y = torch.tensor([0, 5, 6, 3, 1, 2, 9], dtype=dtype)
    check_node(ops.pow_, (x, y))
    check_node(ops.pow_, (x, 3))
    if dtype.is_signed:
        check_node(ops.pow_, (torch.tensor([1, -1, -1, 2, -3], dtype=dtype), y[:5] * 0 - 3))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_where(dtype: torch.dtype) -> None:
    condition = torch.randn(3, 5) > 0
    x, y = (torch.randn(n).mul(9).to(dtype) for n in ((3, 1), (5,)))
    check_node(ops.where, (condition, x, y))
    check_node(ops.where, (condition, x, -torch.inf if dtype.is_floating_point else -3))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_glu(activation: str, dtype: torch.dtype) -> None:
    attrs = {"alpha": 1.702, "limit": 1.5} if activation == CLAMPED else {}
    pair = (Strided(draw(3, 300, dtype=dtype)), Strided(draw(3, 300, dtype=dtype)))
    check_node(glu, pair, {"activation": activation, **attrs})


@pytest.mark.parametrize("value", [2.5, torch.inf, -0.0, torch.nan])
def test_full(value: float) -> None:
    for dtype in ("f32", "bf16", "f64"):
        check_node(full, (), {"value": value, "shape": (3, 5), "dtype": dtype})
    check_node(full, (), {"value": 7, "shape": (), "dtype": "i64"})
    check_node(full, (), {"value": 1, "shape": (2,), "dtype": "bool"})


@pytest.mark.parametrize("dtype", ["i32", "i64", "f32", "bf16"])
def test_arange(dtype: str) -> None:
    check_node(arange, (), {"start": 3, "stop": 600, "step": 2, "dtype": dtype})


def test_strided_operands_are_read_where_they_lie() -> None:
    x = Strided(draw(3, 4, 40))
    lowered = check_node(ops.add, (x, draw(40)))
    (entry,) = lowered.program.entries
    assert [launch.label.split()[0] for launch in entry.launches] == ["add", "copy"]


def test_nothing_is_computed_of_nothing() -> None:
    check_node(ops.add, (draw(0, 3), draw(3)), tolerance=1.0)


# ---- regions


def lowered_graph(text: str, binding: dict[str, int], target: str = "cuda:sm_90") -> Any:
    graph = parse(text)
    outputs = [f"out{i}" for i in range(len(graph.outputs))]
    chosen = target_of(target)
    backend = InterpretedBackend(chosen)
    lowered = lower(graph, Weights({}), chosen, [binding], outputs, backend=backend)
    return graph, lowered, backend


def labels(lowered: Any) -> list[str]:
    (entry,) = lowered.program.entries
    return [launch.label for launch in entry.launches if not launch.label.startswith("copy")]


def agree(graph: Graph, lowered: Any, inputs: dict[str, torch.Tensor]) -> None:
    """The program computes bit for bit what the interpreter does."""
    executable = InterpretedDriver("cuda:sm_90").load(lowered.program, lowered.load_weight)
    (entry,) = lowered.program.entries
    found = executable.run(entry.name, inputs)
    expected = interpret(graph, inputs, Weights({})).outputs
    for i, value in enumerate(expected):
        assert torch.equal(torch.from_numpy(found[f"out{i}"]), value.to(_seen(value))), i


def _seen(value: torch.Tensor) -> torch.dtype:
    return torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype


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
    lower(graph, Weights({}), backend.target, bindings, ("a", "b"), backend=backend)
    names = [s.function.__name__ for s in backend.sources.values()]
    assert names.count("pointwise_mul_add_mul_and_5") == 1


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
    assert len([b for b in entry.buffers if b.kind == "scratch"]) == 3
    executable = InterpretedDriver("cuda:sm_90").load(lowered.program, lowered.load_weight)
    inputs = {n: draw(3, 8) for n in "xy"}
    found = executable.run(entry.name, inputs)
    expected = interpret(graph, inputs, Weights({})).outputs
    for i, value in enumerate(expected):
        torch.testing.assert_close(torch.from_numpy(found[f"out{i}"]), value)


def test_a_long_chain_is_cut() -> None:
    steps = "\n".join(f"  %{i + 1} = neg(%{i}) : f32[T]" for i in range(40))
    text = f"graph @long(%x: f32[T]) T=1..64 {{\n  %0 = abs(%x) : f32[T]\n{steps}\n  return %40\n}}"
    _, lowered, _ = lowered_graph(text, {"T": 3})
    assert [label.count("+") + 1 for label in labels(lowered)] == [16, 16, 9]


EXACT = (ops.add, ops.sub, ops.mul, ops.maximum, ops.minimum)


@st.composite
def dags(draw_: Any) -> Graph:
    """Element-wise ops over [T, 12] and its rows and columns, between sums that end regions."""
    dtype = draw_(st.sampled_from(("bf16", "f16", "f32")))
    t = symbol("T")
    shapes = ((t, 12), (12,), (t, 1), (t, 12))
    params = [param(name=f"p{i}", type=TensorType(dtype, s)) for i, s in enumerate(shapes)]
    values = list(params)
    for _ in range(draw_(st.integers(2, 14))):
        a, b = draw_(st.sampled_from(values)), draw_(st.sampled_from(values))
        kind = draw_(st.sampled_from(("two", "two", "two", "number", "one", "choice", "amax")))
        if kind == "two":
            new = draw_(st.sampled_from(EXACT))(a, b)
        elif kind == "number":
            scale = literal(value=draw_(st.sampled_from((0.3, -2.0, 1e-3))), dtype=dtype)
            new = ops.mul(a, scale)
        elif kind == "one":
            new = draw_(st.sampled_from((ops.neg, ops.abs_, ops.relu)))(a)
        elif kind == "choice":
            new = ops.where(ops.lt(a, b), a, b)
        elif a.type.shape == (t, 12):
            new = amax(a, dim=-1, keepdim=True)
        else:
            new = ops.neg(a)
        values.append(new)
    made = values[len(params) :]
    chosen = draw_(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique=True))
    return Graph("drawn", tuple(params), tuple(chosen), {"T": range(1, 65)})


@given(dags(), st.sampled_from((1, 2, 5)), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_dag_computes_what_its_ops_do(graph: Graph, tokens: int, seed: int) -> None:
    chosen = target_of("cuda:sm_90")
    outputs = [f"out{i}" for i in range(len(graph.outputs))]
    backend = InterpretedBackend(chosen)
    lowered = lower(graph, Weights({}), chosen, [{"T": tokens}], outputs, backend=backend)
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        p.attrs["name"]: random_tensor(p.type.bind({"T": tokens}), generator) for p in graph.params
    }
    agree(graph, lowered, inputs)


@given(dags())
@settings(max_examples=60, deadline=None)
def test_groups_are_convex_and_in_order(graph: Graph) -> None:
    nodes = [n for n in graph.nodes() if n.op not in (param, literal)]
    groups = grouped(nodes, fusible)
    assert Counter(n for g in groups for n in g) == Counter(nodes)
    place = {n: i for i, g in enumerate(groups) for n in g}
    for node in nodes:
        assert all(place[a.node] <= place[node] for a in node.args if a.node in place)
    for group in groups:
        assert len(group) == 1 or all(fusible(n) for n in group)
        assert len({n.types[0].shape for n in group}) == 1


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
        "copy_kernel",
        "pointwise_mul_exp",
        "pointwise_neg_mul_exp",
        "softmax_kernel",
    ]


def test_they_build_for_every_target() -> None:
    for name in ALL_TARGETS:
        _, _, backend = lowered_graph(CHAIN, {"T": 5}, name)
        for source in backend.sources.values():
            facts = build_one(source, target_of(name)).facts
            assert facts["spills"] == 0
    x = draw(4, 64)
    for op in (ops.gelu, ops.pow_, ops.cast):
        given_ = {ops.gelu: {"approximate": "none"}, ops.cast: {"dtype": "i64"}}
        args = (x, x.clone()) if op is ops.pow_ else (x,)
        build_everywhere(op, args, given_.get(op))
    whole = torch.arange(8)
    build_everywhere(ops.pow_, (whole, whole.clone()))
    build_everywhere(ops.maximum, (x.bfloat16(), 0.5))
    build_everywhere(ops.logical_or, (x > 0, x < 1))
    build_everywhere(ops.add, (x > 0, x < 1))
    build_everywhere(ops.div, (x.double(), x.double()))
    build_everywhere(arange, (), {"start": 3, "stop": 600, "step": 2, "dtype": "bf16"})
    build_everywhere(full, (), {"value": torch.nan, "shape": (3,), "dtype": "f16"})
    pair = (x.bfloat16(), x.bfloat16())
    build_everywhere(glu, pair, {"activation": CLAMPED, "alpha": 1.7, "limit": 7.0})
