"""The textual IR: what is printed reads back, and what is not IR is refused with its line."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.ir import Graph, Node, Op, Value, show_attr
from ingot.compiler.ops import attention, pointwise, reduce, shape
from ingot.compiler.ops.aten import aten_op
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.text import ParseError, parse, parse_type, same_structure
from ingot.compiler.types import TensorType, VerifyError, dim, symbol
from ingot.compiler.verify import verify
from op_cases import sampled_ops
from random_graphs import SYMBOLS, graphs

T, L = symbol("T"), symbol("L")
X = TensorType("f32", (T, 8))
# Takes any attributes: what can be written as an attribute is the text's concern alone.
anything = Op("test.anything", lambda x, **attrs: (x,), lambda x, **attrs: (x,))


def holding(**attrs: Any) -> Graph:
    x = param(name="x", type=X)
    return Graph("g", (x,), (anything(x, **attrs),), SYMBOLS)


def round_trip(graph: Graph) -> Graph:
    text = str(graph)
    again = parse(text)
    assert same_structure(again, graph), f"read back as\n{again}\nfrom\n{text}"
    assert str(again) == text
    return again


# ---- round trips


@given(graphs())
def test_random_graphs_read_back(graph: Graph) -> None:
    verify(round_trip(graph))


@pytest.mark.parametrize(("op", "sample"), sampled_ops(), ids=lambda x: getattr(x, "name", ""))
def test_every_op_reads_back(op: Op, sample: Any) -> None:
    params = tuple(param(name=f"a{i}", type=t) for i, t in enumerate(sample.args))
    round_trip(Graph("g", params, sample.node(params).results))


def _combine(parts: tuple[str, Any, Any]) -> Any:
    sign, a, b = parts
    if sign == "/":
        return dim(sympy.floor(sympy.sympify(a) / 3))
    return dim({"+": a + b, "*": a * b, "-": a - b}[sign])


dims = st.recursive(
    st.integers(0, 4096) | st.sampled_from((T, L)),
    lambda inner: st.tuples(st.sampled_from("+*-/"), inner, inner).map(_combine),
    max_leaves=6,
)


@given(dims)
def test_dims_read_back(value: Any) -> None:
    assert parse_type(f"f32[{value}]").shape == (value,)


@pytest.mark.parametrize(
    "value",
    [
        dim(T / 2 + sympy.Rational(1, 2)),
        dim(sympy.Rational(3, 2) * T * L),
        dim(-((-T) // 2)),
        dim(sympy.ceiling(T / 4)),
        sympy.Mod(T, 4),
        sympy.Min(T, 4),
        sympy.Max(T, L, 7),
        dim(T**3 - 2 * T**2),
    ],
)
def test_fractions_and_functions_in_dims_read_back(value: Any) -> None:
    type_ = TensorType("bf16", (3, value, T))
    assert parse_type(str(type_)) == type_


scalars = (
    st.integers()
    | st.floats()
    | st.booleans()
    | st.none()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from((T, 2 * T + 1, T * L, math.inf, -math.inf, math.nan, -0.0))
)
attributes = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=8
)


@given(st.dictionaries(st.sampled_from(("a", "shape", "value", "from_", "self")), attributes))
def test_attributes_of_every_kind_read_back(attrs: dict[str, Any]) -> None:
    x = param(name="x", type=X)
    graph = Graph("g", (x,), anything.node((x,), attrs).results, SYMBOLS)
    (again,) = round_trip(graph).outputs
    assert {k: show_attr(v) for k, v in again.attrs.items()} == {
        k: show_attr(v) for k, v in attrs.items()
    }


def test_numbers_keep_their_kind() -> None:
    (value,) = parse(
        str(holding(a=1, b=1.0, c=True, d=-0.0, e=-3, f=math.nan, g=-math.inf))
    ).outputs
    assert [type(value.attrs[k]) for k in "abcdefg"] == [int, float, bool, float, int, float, float]
    assert math.copysign(1, value.attrs["d"]) == -1
    assert math.isnan(value.attrs["f"])


@pytest.mark.parametrize(
    "text", ["it's", "\"both\" 'kinds'", "%0 = add(@w) : f32[1]", "a\nb\\", "#"]
)
def test_strings_are_not_read_as_ir(text: str) -> None:
    (value,) = round_trip(holding(note=text, names=(text, "x"))).outputs
    assert value.attrs["note"] == text


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (1.5, "f32"),
        (-2, "i64"),
        (True, "bool"),
        (math.inf, "bf16"),
        (-math.inf, "f16"),
        (1e-45, "f64"),
    ],
)
def test_literals_read_back(number: Any, dtype: str) -> None:
    x = param(name="x", type=TensorType(dtype, (T,)))
    y = pointwise.eq(x, literal(value=number, dtype=dtype))
    (again,) = round_trip(Graph("g", (x,), (y, y.node.args[1]), SYMBOLS)).outputs[:1]
    found = again.node.args[1].attrs["value"]
    assert (type(found), found) == (type(number), number)


def test_names_with_dots_dashes_and_slashes() -> None:
    x = param(name="model.layers.0.in-put/x", type=X)
    w = constant(name="layers.0.mlp/gate-proj.weight", type=TensorType("f32", (8,)))
    graph = Graph(
        "a.b-c", (x,), (pointwise.mul(x, w), w, x), SYMBOLS, {"model.layers.0.in-put/x": x}
    )
    again = round_trip(graph)
    assert again.name == "a.b-c"
    assert again.outputs[1].attrs["name"] == "layers.0.mlp/gate-proj.weight"


def test_updates_constants_and_unused_parameters_are_kept() -> None:
    x, idle, state = (param(name=n, type=X) for n in ("x", "idle", "state"))
    new = pointwise.add(state, x)
    graph = Graph("g", (x, idle, state), (), SYMBOLS, {"state": new, "idle": x})
    again = round_trip(graph)
    assert list(again.updates) == ["state", "idle"]
    assert again.updates["idle"] is not again.updates["state"]
    assert [p.attrs["name"] for p in again.params] == ["x", "idle", "state"]


def test_aten_nodes_read_back() -> None:
    x = param(name="x", type=X)
    flags = aten_op("aten.index.Tensor")(
        x, constant(name="i", type=TensorType("i64", (3,))), indices=(False, True)
    )
    parts = aten_op("aten.split_with_sizes.default").all(x, split_sizes=(3, 5), dim=-1)
    cast = aten_op("aten._to_copy.default")(x, dtype="bf16")
    graph = Graph("g", (x,), (flags, *parts, cast), SYMBOLS)
    again = round_trip(graph)
    assert again.outputs[1].op.name == "aten.split_with_sizes.default"


# ---- the form


def small() -> Graph:
    index = TensorType("i32", (T,))
    cache_type = TensorType("f32", (6, 4, 1, 8))
    x, cache = param(name="x", type=X), param(name="k_cache.0", type=cache_type)
    slots, positions = param(name="slots", type=index), param(name="positions", type=index)
    table = param(name="page_table", type=TensorType("i32", (2, 3)))
    w = constant(name="layers.0.q.weight", type=TensorType("f32", (8, 8)))
    linear = Op.registry["linear"]
    (q,) = linear.node((x, w), {}, "model.layers.0.q @model.py:7").results
    scaled = pointwise.mul(q, literal(value=0.125, dtype="f32"))
    (rows,) = shape.view.node((scaled,), {"shape": (T, 1, 8)}, "model.layers.0.q").results
    (new,) = attention.kv_append.node(
        (cache, rows, slots, positions, table), {}, "model.layers.0.attn"
    ).results
    top = reduce.topk.node((scaled,), {"k": 2, "dim": -1}, "model.head").results
    params = (x, cache, slots, positions, table)
    return Graph("small", params, (top[1], top[0]), {"T": range(1, 129)}, {"k_cache.0": new})


def test_golden_text(golden: Callable[[str], None]) -> None:
    golden(str(small()))


def test_comments_and_blank_lines_do_not_count() -> None:
    text = str(small())
    assert "  # model.layers.0.attn\n" in text
    stripped = "\n".join(r for r in text.splitlines() if r.strip() and r.strip()[0] != "#")
    assert same_structure(parse(stripped), small())


# ---- same_structure tells graphs apart


def _edited(old: str, new: str) -> Graph:
    text = str(small())
    assert text.count(old) >= 1
    return parse(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@small", "@large"),
        ("T=1..128", "T=1..129"),
        ("f32(0.125)", "f32(0.25)"),
        ("mul(%0, f32(0.125))", "mul(f32(0.125), %0)"),
        ("mul(", "add("),
        ("return %3, %2", "return %2, %2"),
        ("return %3, %2", "return %2"),
        ("update %k_cache.0 = %5", "update %k_cache.0 = %k_cache.0"),
        ("  update %k_cache.0 = %5\n", ""),
        ("layers.0.q.weight", "layers.1.q.weight"),
        ("k_cache.0", "k_cache.1"),
        ("dim=-1", "dim=1"),
    ],
)
def test_same_structure_sees_every_difference(old: str, new: str) -> None:
    other = _edited(old, new)
    assert not same_structure(other, small())
    assert not same_structure(small(), other)
    assert same_structure(small(), small())


def test_same_structure_tells_sharing_from_repetition() -> None:
    x = param(name="x", type=X)
    one = pointwise.relu(x)
    shared = Graph("g", (x,), (pointwise.add(one, one),), SYMBOLS)
    twice = Graph("g", (x,), (pointwise.add(one, pointwise.relu(x)),), SYMBOLS)
    assert not same_structure(shared, twice)
    assert not same_structure(twice, shared)


def test_same_structure_tells_which_node_is_meant() -> None:
    x, y = param(name="x", type=X), param(name="y", type=X)
    a, b = pointwise.relu(x), pointwise.relu(y)
    one, two = (Graph("g", (x, y), (a, b, pointwise.sub(*o)), SYMBOLS) for o in ((a, b), (b, a)))
    assert not same_structure(one, two)
    forged = Value(Node(pointwise.relu, (x,), {}, (TensorType("f16", (T, 8)),)))
    assert not same_structure(Graph("g", (x,), (a,), SYMBOLS), Graph("g", (x,), (forged,), SYMBOLS))


def test_same_structure_tells_the_kinds_of_numbers_apart() -> None:
    kinds = [holding(a=v) for v in (1, 1.0, True, "1", (1,), None, 0.0, -0.0, math.nan, T, "T")]
    for i, a in enumerate(kinds):
        for j, b in enumerate(kinds):
            assert same_structure(a, b) == (i == j)


# ---- refusals

HEAD = "graph @g(%x: f32[T, 8]) T=1..64 {"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("%0 = frobnicate(%x) : f32[T, 8]", "unknown op 'frobnicate'"),
        ("%0 = relu(%y) : f32[T, 8]", "%y is used before it is defined"),
        ("%0 = relu(@w) : f32[T, 8]", "@w is used before it is defined"),
        ("%0 = relu(%x : f32[T, 8]", "never closed"),
        ("%0 = %x : f32[T, 8]", "expected an op applied to arguments"),
        ("%0, %1 = relu(%x) : f32[T, 8]", "relu has 1 results, found 2 names"),
        ("%x = relu(%x) : f32[T, 8]", "%x is defined before"),
        ("%0 = relu(%x) : g32[T, 8]", "expected a type such as"),
        ("%0 = relu(f32()) : f32[]", "not an argument"),
        ("%0 = relu(1.0) : f32[]", "not an argument"),
        ("%0 = add(%x, f32('a')) : f32[T, 8]", "a number, True or False for value, found 'a'"),
        ("%0 = softmax(%x, dim=min(1, 2)) : f32[T, 8]", r"not an attribute: min\(1, 2\)"),
        ("%0 = softmax(%x, dim=-'a') : f32[T, 8]", "expected a number, found 'a'"),
        ("%0 = softmax(%x, dim='a' * 10**9) : f32[T, 8]", "expected a number, found 'a'"),
        ("%0 = softmax(%x, dim=9**9**9) : f32[T, 8]", "expected an exponent within"),
        ("%0 = softmax(%x, dim=1/0) : f32[T, 8]", "expected|no dim|zoo|cannot"),
        ("%0 = softmax(%x, dim=__import__('os')) : f32[T, 8]", "not an attribute"),
        ("%0 = softmax(%x, dim=().__class__) : f32[T, 8]", "not an attribute"),
        ("%0 = full(value=0, shape=[T], dtype='f32') : f32[T, 'a']", "expected"),
    ],
)
def test_what_is_not_ir_is_refused_with_its_line(body: str, message: str) -> None:
    text = f"{HEAD}\n  # a comment\n  {body}\n  return %x\n}}"
    with pytest.raises((ParseError, VerifyError), match=message) as caught:
        parse(text)
    assert str(caught.value).startswith("line 3: ")
    assert str(caught.value).endswith(f"\n  {body}")


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "expected `graph @name", 0),
        ("grph @g() {\n}", "expected `graph @name", 1),
        (f"{HEAD}\n  return %y\n}}", "%y is used before", 2),
        (f"{HEAD}\n  return %x\n  update %x = %z\n}}", "%z is used before", 3),
        (f"{HEAD}\n  return %x\n}} where {{\n  @w: f33[1]\n}}", "expected a type", 4),
        ("graph @g(%x: f32[T, 9**9**9]) T=1..64 {\n  return %x\n}", "exponent", 1),
    ],
)
def test_every_line_of_a_graph_can_be_quoted(text: str, message: str, line: int) -> None:
    with pytest.raises(ParseError, match=re.escape(message)) as caught:
        parse(text)
    assert str(caught.value).startswith(f"line {line}: ")


def test_written_types_must_be_those_that_the_op_gives() -> None:
    text = f"{HEAD}\n  %0 = relu(%x) : f32[T, 9]\n  return %0\n}}"
    with pytest.raises(VerifyError, match=r"written as f32\[T, 9\], but the op gives f32\[T, 8\]"):
        parse(text)
    wrong = f"{HEAD}\n  %0 = add(%x, f16(1.0)) : f32[T, 8]\n  return %0\n}}"
    with pytest.raises(VerifyError, match=r"line 2: add: expected equal dtypes"):
        parse(wrong)


@pytest.mark.parametrize("argument", ["%x[0]", "x[%x]", "%x[%x]"])
def test_an_argument_is_a_value_or_a_number(argument: str) -> None:
    with pytest.raises(ParseError, match="not an argument"):
        parse(f"{HEAD}\n  %0 = relu({argument}) : f32[T, 8]\n  return %0\n}}")


@settings(max_examples=200)
@given(st.data())
def test_damaged_text_raises_only_parse_and_verify_errors(data: st.DataObject) -> None:
    text = str(small())
    at = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 6))
    new = data.draw(st.text("%@()[]{}=.,:'\"\\ 0Tf*/-\n", max_size=4))
    with contextlib.suppress(ParseError, VerifyError):
        parse(text[:at] + new + text[at + length :])


def test_a_value_out_of_place_is_shown_not_raised() -> None:
    x = param(name="x", type=X)
    inner = pointwise.relu(x)
    broken = Node(pointwise.neg, (Value(inner.node, 7),), {}, (X,))
    assert "neg(%?relu.7)" in str(Graph("g", (x,), (Value(broken),), SYMBOLS))
