"""The interpreter: binding of symbols, lazy weights, freeing of dead values, updates."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.interpret import bind_symbols, compute, interpret, random_tensor
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.ops import linear, pointwise, reduce, shape
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.text import parse
from ingot.compiler.torch_types import type_of
from ingot.compiler.types import TensorType, VerifyError, symbol
from ingot.compiler.weights import Entry, Weights
from random_graphs import graphs

T, L = symbol("T"), symbol("L")
X = TensorType("f32", (T, 4))
SYMBOLS = {"T": range(2, 65)}
relu = Op.registry["relu"]


def p(name: str = "x", type_: TensorType = X) -> Value:
    return param(name=name, type=type_)


def test_outputs_and_updates() -> None:
    x, state = p(), p("state")
    graph = Graph("g", (x, state), (relu(x), x), SYMBOLS, {"state": pointwise.add(state, x)})
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    kept = b.clone()
    found = interpret(graph, {"x": a, "state": b})
    assert torch.equal(found.outputs[0], a.relu())
    assert found.outputs[1] is a
    assert torch.equal(found.updates["state"], a + b)
    assert torch.equal(b, kept), "inputs stay as they are"


def test_every_node_is_computed_once() -> None:
    calls: Counter[str] = Counter()

    def reference(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls["op"] += 1
        return (x,)

    op = Op("test.counted", lambda x: (x,), reference)
    x = p()
    once = op(x)
    graph = Graph("g", (x,), (pointwise.add(once, once), once), SYMBOLS)
    interpret(graph, {"x": torch.randn(3, 4)})
    assert calls["op"] == 1


@given(graphs(extra=False), st.integers(1, 9))
def test_a_graph_read_back_means_the_same(graph: Graph, tokens: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    inputs = {q.attrs["name"]: random_tensor(q.type.bind({"T": tokens}), g) for q in graph.params}
    tensors = {
        n.attrs["name"]: random_tensor(n.types[0], g) for n in graph.nodes() if n.op is constant
    }
    one, two = (interpret(x, inputs, Weights.of(tensors)) for x in (graph, parse(str(graph))))
    for a, b in zip(
        (*one.outputs, *one.updates.values()), (*two.outputs, *two.updates.values()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- symbols


def bind(
    shapes: dict[str, tuple[int, ...]], *types: TensorType, **symbols: range
) -> dict[str, int]:
    params = tuple(p(f"p{i}", t) for i, t in enumerate(types))
    return bind_symbols(Graph("g", params, (), symbols or SYMBOLS), shapes)


def test_symbols_are_bound_by_the_shapes_of_parameters() -> None:
    types = (TensorType("f32", (2 * T + 1, 4)), X, TensorType("i32", (L,)))
    shapes = {"p0": (11, 4), "p1": (5, 4), "p2": (3,)}
    assert bind(shapes, *types, T=range(1, 9), L=range(1, 9)) == {"T": 5, "L": 3}


@pytest.mark.parametrize(
    ("shapes", "types", "message"),
    [
        ({}, (X,), r"parameter %p0: expected f32\[T, 4\], found nothing"),
        ({"p0": (3,)}, (X,), r"parameter %p0: expected f32\[T, 4\], found \[3\]"),
        ({"p0": (3, 5)}, (X,), r"parameter %p0: expected f32\[T, 4\], found \[3, 5\]"),
        ({"p0": (3, 4), "p1": (4, 4)}, (X, X), r"parameter %p1: expected .*found \[4, 4\]"),
        ({"p0": (1, 4)}, (X,), r"T = 1 is not in 2\.\.64"),
        ({"p0": (65, 4)}, (X,), r"T = 65 is not in 2\.\.64"),
        (
            {"p0": (6,)},
            (TensorType("f32", (2 * T,)),),
            r"no parameter's shape gives all of f32\[2\*T\]",
        ),
        ({"p0": (4,)}, (TensorType("f32", (4,)),), "no parameter's shape gives the symbols T"),
        ({"p0": (3, 4), "p1": (3,)}, (X, TensorType("f32", (L,))), "L is not a symbol of graph @g"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shapes: dict[str, tuple[int, ...]], types: tuple[TensorType, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bind(shapes, *types)


def test_dtypes_that_do_not_fit_are_refused() -> None:
    x = p()
    with pytest.raises(ValueError, match=r"parameter %x: expected f32\[T, 4\], found f64"):
        interpret(Graph("g", (x,), (x,), SYMBOLS), {"x": torch.randn(3, 4).double()})


def test_dims_in_attributes_are_bound() -> None:
    x = p()
    flat = shape.view(x, shape=(4 * T,))
    last = shape.slice_(x, dim=0, start=T - 1, stop=T)
    ones = shape.full(value=1.0, shape=(T, 2), dtype="f32")
    steps = shape.arange(start=0, stop=2 * T, step=3, dtype="i64")
    graph = Graph("g", (x,), (flat, last, ones, steps), SYMBOLS)
    a = torch.randn(5, 4)
    found = interpret(graph, {"x": a}).outputs
    assert torch.equal(found[0], a.flatten())
    assert torch.equal(found[1], a[4:])
    assert found[2].shape == (5, 2)
    assert found[3].tolist() == [0, 3, 6, 9]


# ---- weights


def counted_weights(loads: Counter[str], **tensors: torch.Tensor) -> Weights:
    def entry(name: str, tensor: torch.Tensor) -> Entry:
        def load() -> torch.Tensor:
            loads[name] += 1
            return tensor.clone()

        return Entry(type_of(tensor), load, "test")

    return Weights({n: entry(n, t) for n, t in tensors.items()})


def test_only_the_weights_that_are_needed_are_loaded_once_each() -> None:
    loads: Counter[str] = Counter()
    weights = counted_weights(loads, w=torch.randn(4, 4), v=torch.randn(4), idle=torch.randn(4))
    x, w, v = (
        p(),
        constant(name="w", type=TensorType("f32", (4, 4))),
        constant(name="v", type=TensorType("f32", (4,))),
    )
    linear.linear(x, w)  # never used: not part of the graph
    graph = Graph("g", (x,), (linear.linear(linear.linear(x, w), w), relu(v)), SYMBOLS)
    interpret(graph, {"x": torch.randn(3, 4)}, weights)
    assert loads == Counter({"w": 1, "v": 1})


def test_weights_that_are_missing_or_differ() -> None:
    x, w = p(), constant(name="w", type=TensorType("f32", (4,)))
    graph = Graph("g", (x,), (pointwise.mul(x, w),), SYMBOLS)
    inputs = {"x": torch.randn(3, 4)}
    with pytest.raises(KeyError, match="weight @w is needed, but no weights were given"):
        interpret(graph, inputs)
    with pytest.raises(KeyError, match="no weight 'w' among the 1 of this store"):
        interpret(graph, inputs, Weights.of({"v": torch.randn(4)}))
    for wrong in (torch.randn(1), torch.randn(4).double()):
        with pytest.raises(VerifyError, match=r"weight @w: expected f32\[4\], the store has f"):
            interpret(graph, inputs, Weights.of({"w": wrong}))


# ---- memory


def watched() -> tuple[Op, list[int]]:
    """An op whose results are counted while they live: the most alive at once, so far."""
    alive: set[int] = set()
    peak = [0]
    number = iter(range(10**9))

    def reference(x: torch.Tensor) -> tuple[torch.Tensor]:
        result, key = x + 1, next(number)
        alive.add(key)
        weakref.finalize(result, alive.discard, key)
        peak[0] = max(peak[0], len(alive))
        return (result,)

    return Op(f"test.watched{id(peak)}", lambda x: (x,), reference), peak


def test_values_are_freed_after_their_last_use() -> None:
    op, peak = watched()
    x = value = p()
    for _ in range(50):
        value = op(value)
    gc.collect()
    interpret(Graph("g", (x,), (value,), SYMBOLS), {"x": torch.zeros(3, 4)})
    assert peak[0] <= 3


def test_values_that_are_still_needed_are_kept() -> None:
    op, _ = watched()
    x = p()
    first = op(x)
    value = first
    for _ in range(10):
        value = op(value)
    graph = Graph("g", (x,), (pointwise.add(value, first), first), SYMBOLS)
    found = interpret(graph, {"x": torch.zeros(3, 4)}).outputs
    assert found[0].eq(12).all()
    assert found[1].eq(1).all()


def test_weights_are_freed_too() -> None:
    peak, alive = [0], set[str]()

    def entry(name: str) -> Entry:
        def load() -> torch.Tensor:
            tensor = torch.zeros(4)
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            peak[0] = max(peak[0], len(alive))
            return tensor

        return Entry(TensorType("f32", (4,)), load, "test")

    x = value = p()
    names = [f"w{i}" for i in range(20)]
    for name in names:
        value = pointwise.add(value, constant(name=name, type=TensorType("f32", (4,))))
    weights = Weights({n: entry(n) for n in names})
    interpret(Graph("g", (x,), (value,), SYMBOLS), {"x": torch.zeros(3, 4)}, weights)
    assert peak[0] <= 2


# ---- references that break their type rule


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 4).double(), r"reference gave f64\[3, 4\], not f32\[3, 4\]"),
        (torch.zeros(3, 5), r"reference gave f32\[3, 5\], not f32\[3, 4\]"),
    ],
)
def test_a_reference_that_breaks_its_type_rule_is_named(result: Any, message: str) -> None:
    op = Op(f"test.broken{message}", lambda x: (x,), lambda x: (result,))
    x = p()
    with pytest.raises(VerifyError, match=message):
        interpret(Graph("g", (x,), (op(x),), SYMBOLS), {"x": torch.randn(3, 4)})


def test_leaves_are_bound_not_computed() -> None:
    with pytest.raises(
        VerifyError, match="'x' is an input of the graph: it is bound, not computed"
    ):
        compute(p().node, (), {"T": 3})


def test_literals_as_outputs_and_operands() -> None:
    x, half = p(), literal(value=0.5, dtype="f32")
    total = pointwise.add(half, half)
    graph = Graph("g", (x,), (pointwise.mul(half, x), total, pointwise.neg(half)), SYMBOLS)
    a = torch.randn(3, 4)
    found = interpret(graph, {"x": a}).outputs
    assert torch.equal(found[0], a / 2)
    assert found[1].item() == 1.0
    assert type_of(found[2]) == TensorType("f32", ())


# ---- random tensors


def test_random_tensors_are_of_their_type_and_repeatable() -> None:
    for dtype in ("bool", "u8", "i32", "i64", "f16", "bf16", "f32", "f64", "c64", "f8e4m3"):
        type_ = TensorType(dtype, (64,))
        one, two = (random_tensor(type_, torch.Generator().manual_seed(3), 5) for _ in range(2))
        assert type_of(one) == type_
        assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    whole = random_tensor(TensorType("i64", (500,)), torch.Generator().manual_seed(3), 5)
    assert set(whole.tolist()) == {0, 1, 2, 3, 4}


def test_multi_result_nodes_are_freed_together() -> None:
    x = p()
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    graph = Graph("g", (x,), (shape.gather(x, indices, dim=-1), values), SYMBOLS)
    a = torch.randn(3, 4)
    found = interpret(graph, {"x": a}).outputs
    assert torch.equal(found[0], found[1])
