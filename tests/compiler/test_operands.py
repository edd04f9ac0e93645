"""Named operands: the schema of an op, nodes that have some of it, their text and patterns."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.ir import Graph, Op, Value
from ingot.compiler.ops.leaf import constant, param
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.norm import layer_norm, rms_norm
from ingot.compiler.ops.pointwise import add, tanh
from ingot.compiler.ops.shape import cat
from ingot.compiler.rewrite import Every, Log, Match, Pat, Rule, pat, rewrite
from ingot.compiler.text import parse, same_structure
from ingot.compiler.types import TensorType, Types, VerifyError, symbol
from ingot.passes.raising.canonicalize import common_subexpressions

T = symbol("T")
X, W, V = TensorType("f32", (T, 8)), TensorType("f32", (8, 8)), TensorType("f32", (8,))
x, y = (param(name=name, type=X) for name in ("x", "y"))
w, v = constant(name="w", type=W), constant(name="v", type=V)
GIVEN: dict[str, Value] = {"norm": v, "delta": y, "post_norm": v, "bias": v, "residual": y}


def graph(*values: Value) -> Graph:
    return Graph("g", (x, y), values, {"T": range(1, 9)})


def test_the_schema_is_the_signature_of_infer() -> None:
    assert layer_norm.operands == ("x", "weight?", "bias?")
    assert (layer_norm.required, layer_norm.optional) == (("x",), ("weight", "bias"))
    assert cat.operands == ("xs*",)


def _same(x: TensorType, *, by: TensorType | None = None, k: int = 0) -> Types:
    return (x,)


def _default(x: TensorType, by: TensorType | None = None) -> Types:
    return (x,)


def _both(*xs: TensorType, by: TensorType | None = None) -> Types:
    return xs


def _vague(x: TensorType, *, k: list[int]) -> tuple[TensorType, ...]:
    return (x,)


def _without(x: Any, *, k: int = 0) -> tuple[Any, ...]:
    return (x,)


@pytest.mark.parametrize(
    ("infer", "reference", "message"),
    [
        (_default, _same, "op test.bad: expected optional operands as keywords of infer, found by"),
        (_both, _both, "any number of operands or optional ones, found both"),
        (_same, _without, "op test.bad: its reference does not take by"),
        (_vague, _same, "op test.bad: expected k of bool, int, .*; found k"),
    ],
)
def test_an_op_without_a_clear_schema_is_not_registered(
    infer: Any, reference: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Op("test.bad", infer, reference)
    assert "test.bad" not in Op.registry


def test_a_node_knows_its_operands_by_name() -> None:
    node = linear(x, w, residual=y, bias=v, norm=None).node
    assert node.given == ("bias", "residual")
    assert node.args == (x, w, v, y)
    assert (node.operand("bias"), node.operand("norm"), node.operand("x")) == (v, None, x)
    assert (node.index_of("weight"), node.index_of("residual")) == (1, 3)
    with pytest.raises(KeyError):
        node.operand("gate")
    assert [*cat(x, y, dim=0).node.operands] == ["xs[0]", "xs[1]"]


def test_operands_and_attributes_are_replaced_added_and_taken_away() -> None:
    node = linear(x, w, bias=v).node
    more = node.replace(x=y, norm=v, eps=0.1)
    assert (more.args, more.given, dict(more.attrs)) == (
        (y, w, v, v),
        ("norm", "bias"),
        {"eps": 0.1},
    )
    less = more.replace(norm=None, eps=None)
    assert (less.args, less.given, dict(less.attrs)) == ((y, w, v), ("bias",), {})
    assert more.rebuilt((x, w, v, v)).given == ("norm", "bias")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linear(x), r"linear: expected x, weight, norm\?, .*; found \(f32\[T, 8\]\)"),
        (lambda: linear(x, w, v), r"linear: expected x, weight, norm\?"),
        (
            lambda: linear(x, w, scale=v),
            "expected values for its optional operands, norm, .*scale=",
        ),
        (lambda: linear(x, w, bias=3), "expected values for its optional operands, .*bias=3"),
        (lambda: add(x, y, bias=v), "optional operands, none; found bias="),
    ],
)
def test_refusals_name_the_op_the_operand_and_what_came(build: Any, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        build()


@given(st.sets(st.sampled_from(sorted(GIVEN))), st.booleans())
def test_text_round_trips_with_any_operands(names: set[str], gate: bool) -> None:
    names -= {"post_norm"} if "delta" not in names else set()
    names -= {"residual"} if gate else set()
    named: dict[str, Any] = {name: GIVEN[name] for name in names}
    named |= {"eps": 0.1} if "norm" in names else {}
    named |= {"post_eps": 0.2} if "post_norm" in names else {}
    named |= {"gate": "silu"} if gate else {}
    before = graph(*linear.all(x, w, **named))
    again = parse(str(before))
    assert same_structure(again, before)
    assert str(again) == str(before)


def test_text_names_operands_in_any_order() -> None:
    text = str(graph(linear(x, w, norm=v, residual=y, eps=0.1)))
    assert "linear(%x, @w, norm=@v, residual=%y, eps=0.1)" in text
    turned = text.replace("norm=@v, residual=%y, eps=0.1", "eps=0.1, residual=%y, norm=@v")
    assert str(parse(turned)) == text
    with pytest.raises(VerifyError, match="line 2: linear: expected values .*found scale=f32"):
        parse(text.replace("residual=", "scale="))


def test_the_same_values_in_other_slots_are_another_node() -> None:
    scaled, shifted = layer_norm(x, weight=v, eps=0.1), layer_norm(x, bias=v, eps=0.1)
    assert not same_structure(graph(scaled), graph(shifted))
    both = graph(scaled, shifted)
    assert common_subexpressions(both, Log()) is both


def test_a_pattern_matches_whatever_optional_operands_are_there() -> None:
    values = [linear(x, w), linear(x, w, bias=v), linear(x, w, bias=v, residual=y)]
    named = Pat()
    for root, expected in (
        (pat(linear, Pat(), Pat()), 3),
        (pat(linear, Pat(), Pat(), bias=named), 2),
        (pat(linear, Pat(), Pat(), absent=("bias",)), 1),
        (pat(linear, bias=Pat(add)), 0),
    ):
        log = Log()
        rewrite(graph(*values), [Rule("r", (root,), lambda m: tanh(y))], log)
        assert len(log.applied) == expected


def test_an_operand_that_no_pattern_speaks_of_is_an_input() -> None:
    """The sum is matched as what the product reads, and is its residual too: it stays outside."""
    total = add(x, y)
    root = pat(linear, SUM := pat(add, Pat(), Pat()), Pat())

    def build(m: Match) -> tuple[Value, ...]:
        return m[root].node.replace(x=x, delta=y).results

    log = Log()
    before = graph(linear(total, w, residual=total))
    assert rewrite(before, [Rule("sum", (Every(root), SUM), build)], log) is before
    assert "an input of the match depends on one of its results" in log.declined[0]


def test_every_result_of_a_node_is_replaced() -> None:
    root = pat(linear, NORM := pat(rms_norm, Pat()), Pat())

    def build(m: Match) -> tuple[Value, ...]:
        inner = m[NORM].node
        named = {"norm": inner.operand("weight"), "eps": inner.attrs["eps"]}
        return m[root].node.replace(x=inner.args[0], **named).results

    log = Log()
    results = linear.all(rms_norm(x, weight=v, eps=0.1), w, delta=y)
    after = rewrite(graph(*results), [Rule("norm", (Every(root),), build)], log)
    assert [o.node.given for o in after.outputs] == [("norm", "delta")] * 2
