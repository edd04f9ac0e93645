"""The verifier: each rule broken once; the message names node, expectation, finding and place."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from ingot.compiler.ir import Graph, Node, Op, Value
from ingot.compiler.ops import pointwise, reduce, shape
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.types import TensorType, VerifyError, symbol
from ingot.compiler.verify import excerpt, verify
from random_graphs import graphs

T = symbol("T")
X = TensorType("f32", (T, 4))
SYMBOLS = {"T": range(1, 65)}
relu = Op.registry["relu"]


def p(name: str = "x", type_: TensorType = X) -> Value:
    return param(name=name, type=type_)


def forged(op: Op, *args: Value, types: tuple[TensorType, ...] = (X,), **attrs: Any) -> Value:
    """A node that no op was asked about."""
    return Value(Node(op, args, attrs, types))


def graph(*outputs: Value, params: tuple[Value, ...] = (), **changes: Any) -> Graph:
    found = Graph("g", (), outputs, SYMBOLS).nodes()
    params = params or tuple(Value(n) for n in found if n.op is param)
    return Graph("g", params, outputs, **{"symbols": SYMBOLS, **changes})


def refusal(broken: Graph) -> str:
    with pytest.raises(VerifyError) as caught:
        verify(broken)
    return str(caught.value)


@given(graphs())
def test_random_graphs_are_sound(sound: Graph) -> None:
    verify(sound)


x = p()
w, wide_w = (constant(name="w", type=TensorType("f32", s)) for s in ((4,), (2, 4)))
inner = relu(x)

BROKEN: dict[str, tuple[Graph, str, str]] = {
    "results are what the op infers": (
        graph(forged(relu, x, types=(TensorType("f32", (T, 5)),))),
        r"relu: expected results f32\[T, 4\], found f32\[T, 5\]",
        "%0 = relu(%x) : f32[T, 5]",
    ),
    "as many results as the op infers": (
        graph(forged(relu, x, types=(X, X))),
        r"relu: expected results f32\[T, 4\], found f32\[T, 4\], f32\[T, 4\]",
        "%0, %1 = relu(%x)",
    ),
    "operands that the op takes": (
        graph(forged(pointwise.add, x, p("y", TensorType("f16", (T, 4))))),
        r"add: expected equal dtypes of .*; found f32\[T, 4\] and f16\[T, 4\]",
        "%0 = add(%x, %y)",
    ),
    "the attributes that the op takes": (
        graph(forged(reduce.softmax, x, axis=1)),
        "softmax: expected attributes among dim; found axis=1",
        "%0 = softmax(%x, axis=1)",
    ),
    "attributes that the op needs": (
        graph(forged(reduce.softmax, x)),
        "softmax: expected dim, an attribute; found none",
        "%0 = softmax(%x)",
    ),
    "arguments are results": (
        graph(forged(relu, Value(inner.node, 3))),
        r"relu: expected results of earlier nodes as arguments, found relu has no result 3",
        "= relu(%?relu.3)",
    ),
    "outputs are results": (
        graph(Value(inner.node, 1), params=(x,)),
        r"relu: expected a result to return, found no result 1",
        "%0 = relu(%x)",
    ),
    "attributes can be written down": (
        graph(forged(shape.view, x, shape=[T, 4])),
        r"view: shape: expected a number, string, dim, type, None or a tuple .* found \[T, 4\]",
        "%0 = view(%x, shape=[T, 4])",
    ),
    "attributes can be written down, also inside tuples": (
        graph(forged(shape.view, x, shape=(T, (4, {2})))),
        r"view: shape: expected a number, .*found \(T, \(4, \{2\}\)\)",
        "%0 = view(",
    ),
    "symbols of types are declared": (
        graph(relu(p("y", TensorType("f32", (symbol("S"), 4)))), params=(x,)),
        r"param: expected a declared parameter, found %y, which is none",
        "%0 = relu(%y)",
    ),
    "symbols of parameters are declared": (
        graph(relu(p("y", TensorType("f32", (2 * symbol("S"), 4))))),
        r"param: expected symbols of the graph \(T\), found \['S'\] in f32\[2\*S, 4\]",
        "%0 = relu(%y)",
    ),
    "symbols of attributes are declared": (
        graph(shape.slice_(x, dim=0, start=symbol("S"), stop=symbol("S") + 1)),
        r"slice: expected symbols of the graph \(T\), found \['S'\] in start=S",
        "%0 = slice(%x",
    ),
    "a graph without symbols": (
        graph(relu(x), symbols={}),
        r"param: expected symbols of the graph \(none\), found \['T'\] in f32\[T, 4\]",
        "relu(%x)",
    ),
    "symbols have sizes": (
        graph(relu(x), symbols={"T": range(5, 5)}),
        r"graph @g: symbol T: expected a range of positive sizes, found 5\.\.4",
        "graph @g(%x: f32[T, 4])",
    ),
    "sizes are positive": (
        graph(relu(x), symbols={"T": range(5)}),
        r"graph @g: symbol T: expected a range of positive sizes, found 0\.\.4",
        "graph @g(%x: f32[T, 4])",
    ),
    "parameters are declared": (
        graph(relu(p("y")), params=(x,)),
        "param: expected a declared parameter, found %y, which is none",
        "%0 = relu(%y)",
    ),
    "parameters of one name are one": (
        graph(relu(p("x")), params=(x,)),
        "param: expected a declared parameter, found %x, which is none",
        "%0 = relu(%x)",
    ),
    "parameters are declared once": (
        graph(relu(x), params=(x, p("x"))),
        "param: expected one parameter %x, found more",
        "graph @g(%x: f32[T, 4], %x: f32[T, 4])",
    ),
    "a parameter is not listed twice": (
        graph(relu(x), params=(x, x)),
        "param: expected one parameter %x, found more",
        "relu(%x)",
    ),
    "parameters are parameters": (
        graph(relu(x), params=(x, inner)),
        "relu: a parameter of the graph: expected a param node",
        "graph @g(%x: f32[T, 4], %?relu.0: f32[T, 4])",
    ),
    "a weight has one type": (
        graph(pointwise.mul(x, w), pointwise.mul(p("y", TensorType("f32", (2, 4))), wide_w)),
        r"constant: weight @w: expected f32\[4\] as elsewhere, found f32\[2, 4\]",
        "%1 = mul(%y, @w)",
    ),
    "weights are what they say": (
        graph(
            pointwise.mul(x, forged(constant, types=(X,), name="v", type=TensorType("f32", (4,))))
        ),
        r"constant: expected results f32\[4\], found f32\[T, 4\]",
        "%0 = mul(%x, @v)",
    ),
    "literals are numbers of their dtype": (
        graph(
            pointwise.add(
                x, forged(literal, types=(TensorType("f32", ()),), value="1", dtype="f32")
            )
        ),
        "literal: expected a number, True or False for value, found '1'",
        "%0 = add(%x, f32(1))",
    ),
    "updates are of parameters": (
        graph(relu(x), updates={"y": inner}),
        "relu: expected a parameter to update, found no parameter %y",
        "%1 = relu(%x)",
    ),
    "updates keep the type": (
        graph(relu(x), updates={"x": reduce.sum_(x, dim=1, keepdim=True)}),
        r"sum: update of %x: expected f32\[T, 4\], found f32\[T, 1\]",
        "sum(%x, dim=1, keepdim=True)",
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_broken_once(rule: str) -> None:
    broken, message, line = BROKEN[rule]
    found = refusal(broken)
    assert re.match(message, found), found
    marked = [row for row in found.splitlines() if row.startswith(">")]
    assert len(marked) == 1
    assert line in marked[0]


def test_unused_parameters_are_checked_too() -> None:
    bad = forged(param, types=(X,), name="y", type=TensorType("f32", (3,)))
    found = refusal(graph(relu(x), params=(x, bad)))
    assert found.startswith("param: expected results f32[3], found f32[T, 4]")


def test_ten_lines_before_and_after() -> None:
    value = x
    for _ in range(30):
        value = relu(value)
    value = bad = forged(pointwise.neg, value, types=(TensorType("f32", (T, 5)),))
    for _ in range(30):
        value = forged(relu, value, types=(TensorType("f32", (T, 5)),))
    rows = refusal(graph(value)).splitlines()[1:]
    assert len(rows) == 21
    assert rows[10].startswith(">   %30 = neg(%29)")
    assert rows[0].startswith("    %20 = relu")
    assert rows[-1].startswith("    %40 = relu")
    assert excerpt(graph(value), bad.node).splitlines() == rows


def test_a_leaf_is_shown_where_it_is_first_used() -> None:
    first, second = pointwise.mul(x, w), pointwise.add(x, w)
    shown = excerpt(graph(first, second), w.node)
    assert [r for r in shown.splitlines() if r.startswith(">")] == [
        ">   %0 = mul(%x, @w) : f32[T, 4]"
    ]


def test_sources_stand_in_the_excerpt() -> None:
    (value,) = relu.node((x,), {}, "model.layers.3.mlp.act @m.py:9").results
    bad = forged(pointwise.neg, value, types=(TensorType("f32", (T, 5)),))
    assert "# model.layers.3.mlp" in refusal(graph(bad))
