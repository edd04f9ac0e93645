"""Sampled checks of rewrites: errors that few tokens show are found, and right rewrites pass."""

from __future__ import annotations

from typing import Any

import pytest
from ingot.compiler.ir import Graph, Value
from ingot.compiler.ops import pointwise, reduce
from ingot.compiler.ops.leaf import constant, literal, param
from ingot.compiler.ops.moe import router
from ingot.compiler.rewrite import Applied
from ingot.compiler.types import TensorType, VerifyError, symbol
from ingot.compiler.validate import check_rewrite

T = symbol("T")
SYMBOLS = {"T": range(1, 4097)}
TRIALS = 1000


def found(rule: Applied, symbols: dict[str, range] = SYMBOLS, trials: int = TRIALS) -> int:
    """How many of the trials tell of the rule."""
    graph = Graph("g", (), rule.before, symbols)
    count = 0
    for _ in range(trials):
        try:
            check_rewrite(graph, rule)
        except VerifyError:
            count += 1
    return count


def routers(*changes: dict[str, Any]) -> Applied:
    """A router by groups, and the same with attributes changed."""
    logits = param(name="logits", type=TensorType("f32", (T, 16)))
    bias = constant(name="bias", type=TensorType("f32", (16,)))
    attrs: dict[str, Any] = {"k": 2, "score": "sigmoid", "normalize": True, "dtype": "f32"}
    attrs |= {"groups": 4, "topk_groups": 2, "group_score": "top2"}
    before = router.all(logits, correction=bias, **attrs)
    for change in changes:
        attrs |= change
    return Applied("router", (logits, bias), before, router.all(logits, correction=bias, **attrs))


def test_what_may_differ_may_not_overflow() -> None:
    """A rewrite that is allowed a difference is held to it also where a result is not finite."""
    x = param(name="x", type=TensorType("f32", (T, 8)))
    beyond = pointwise.mul(x, literal(value=float("inf"), dtype="f32"))
    same = pointwise.mul(x, literal(value=1.01, dtype="f32"))
    for after, wrong in ((beyond, True), (same, False)):
        rule = Applied("rounds", (x,), (x,), (after,), allowed=0.6)
        assert (found(rule, trials=5) == 5) == wrong


RARE = {
    # Another group is chosen for one token in twelve.
    "groups by their largest": routers({"group_score": "max"}),
    "one group fewer": routers({"topk_groups": 3}),
}


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("longest", [64, 4096])
def test_errors_of_routers_are_always_found(name: str, longest: int) -> None:
    assert found(RARE[name], {"T": range(1, longest + 1)}) == TRIALS


def test_an_error_of_one_token_in_a_hundred_is_found() -> None:
    """Expected to be missed once in 30,000 trials: e^-10.2 of 1,024 tokens."""
    x = param(name="x", type=TensorType("f32", (T, 1)))
    seldom = pointwise.gt(x, literal(value=2.33, dtype="f32"))
    before = pointwise.where(seldom, pointwise.neg(x), x)
    assert found(Applied("clip", (x,), (before,), (pointwise.relu(before),))) == TRIALS
    assert found(Applied("drop", (x,), (before,), (x,))) >= TRIALS - 1


def test_right_rewrites_pass() -> None:
    assert found(routers(), trials=100) == 0
    x = param(name="x", type=TensorType("f32", (T, 8)))
    values, indices = reduce.topk.all(x, k=2, dim=-1)
    doubled: tuple[Value, ...] = reduce.topk.all(pointwise.add(x, x), k=2, dim=-1)
    halved = pointwise.mul(doubled[0], literal(value=0.5, dtype="f32"))
    right = Applied("double", (x,), (values, indices), (halved, doubled[1]))
    assert found(right, trials=100) == 0
