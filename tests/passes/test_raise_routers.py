"""raise-ops on routers: scores, correction bias, group limits, normalisation and scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import pytest
from ingot.compiler.ir import Graph, Node
from ingot.passes.raising.raise_ops import RaiseOps
from pass_checks import applied, assert_equal_results, checked, graph_of, ops

EXPERTS, GROUPS, K = 12, 4, 3
SCORES = {
    "softmax": "%s = softmax(%l, dim=1)",
    "sigmoid": "%s = sigmoid(%l)",
}
LIMIT = {
    None: "",
    "max": "%best = amax(%g, dim=2, keepdim=False)",
    "top2": "%top, %ti = topk(%g, k=2, dim=2)\n%best = sum(%top, dim=2, keepdim=False)",
}
NORM = {
    None: "%n = mul(%p, f32(1.0))",
    "plain": "%n = div(%p, %sv)",
    "eps": "%se = add(%sum, f32(1e-20))\n%sv = view(%se, shape=[T, 1])\n%n = div(%p, %sv)",
    "clamp": "%se = clamp(%sum, min=1e-12, max=inf)\n%sv = view(%se, shape=[T, 1])\n"
    "%n = div(%p, %sv)",
}


def router_text(
    score: str = "sigmoid",
    bias: bool = True,
    limit: str | None = "top2",
    norm: str | None = "eps",
    scale: float = 2.5,
    dtype: str = "f32",
    fill: str = "-inf",
) -> str:
    """Logits [T, 12] to weights and indices [T, 3], spelled out as DeepSeek's gate does."""
    choice = "%cb" if bias else "%s"
    lines = [
        f"graph @router(%x: {dtype}[T, {EXPERTS}]) T=1..8 {{",
        "%l = cast(%x, dtype='f32')" if dtype != "f32" else "%l = mul(%x, f32(0.5))",
        SCORES[score],
        "%cb = add(%s, @bias)" if bias else "",
    ]
    if limit:
        lines += [
            f"%g = view({choice}, shape=[T, {GROUPS}, {EXPERTS // GROUPS}])",
            LIMIT[limit],
            "%gv, %gi = topk(%best, k=2, dim=1)",
            f"%zero = full(value=0, shape=[T, {GROUPS}], dtype='f32')",
            "%kept = scatter(%zero, %gi, dim=1, value=1)",
            f"%kc = view(%kept, shape=[T, {GROUPS}, 1])",
            f"%ke = expand(%kc, shape=[T, {GROUPS}, {EXPERTS // GROUPS}])",
            f"%kv = view(%ke, shape=[T, {EXPERTS}])",
            "%mask = cast(%kv, dtype='bool')",
            "%out = logical_not(%mask)",
            f"%limited = where(%out, f32({fill}), {choice})",
        ]
        choice = "%limited"
    lines.append(f"%v, %i = topk({choice}, k={K}, dim=1)")
    gathered = bias or score == "sigmoid"
    lines.append("%p = gather(%s, %i, dim=1)" if gathered else "%p = add(%v, f32(0.0))")
    if norm:
        lines.append("%sum = sum(%p, dim=1, keepdim=False)")
        lines.append("%sv = view(%sum, shape=[T, 1])" if norm == "plain" else "")
    lines += [
        NORM[norm],
        f"%w = mul(%n, f32({scale}))",
        f"%y = cast(%w, dtype='{dtype}')" if dtype != "f32" else "",
        f"return {'%y' if dtype != 'f32' else '%w'}, %i",
        "} where {",
        f"@bias: f32[{EXPERTS}]",
        "}",
    ]
    text = "\n".join(lines)
    # What changes nothing is not there in a canonical graph.
    if norm is None:
        text = text.replace(NORM[None], "").replace("mul(%n,", "mul(%p,")
    if not gathered:
        text = text.replace("%p = add(%v, f32(0.0))", "").replace("%p", "%v")
    return text


def router_of(graph: Graph) -> Node:
    (node,) = (n for n in graph.nodes() if n.op.name == "router")
    return node


@pytest.mark.parametrize(
    ("score", "bias", "limit", "norm"),
    list(product(SCORES, (False, True), LIMIT, (None, "plain", "eps"))),
)
def test_every_family_becomes_one_op(
    score: str, bias: bool, limit: str | None, norm: str | None
) -> None:
    after = checked(RaiseOps(), router_text(score, bias, limit, norm))
    node = router_of(after)
    expected: dict[str, Any] = {
        "k": K,
        "score": score,
        "normalize": norm is not None,
        "dtype": "f32",
        "scale": 2.5,
    }
    if limit:
        expected.update(groups=GROUPS, topk_groups=2, group_score=limit)
    if norm == "eps":
        expected["eps"] = 1e-20
    assert dict(node.attrs) == expected
    assert len(node.args) == 1 + bias
    assert ops(after) == {"mul": 1, "router": 1}


def test_bf16(golden: Callable[[str], None]) -> None:
    golden(str(checked(RaiseOps(), router_text(dtype="bf16"), 1e-2)))


def test_scale_of_one_is_not_said() -> None:
    text = router_text(norm="plain").replace("%w = mul(%n, f32(2.5))", "")
    after = checked(RaiseOps(), text.replace("return %w", "return %n"))
    assert "scale" not in router_of(after).attrs


def test_clamp_that_never_acts() -> None:
    """The k largest of E softmax scores sum to k/E at least."""
    after = checked(RaiseOps(), router_text("softmax", False, None, "clamp"))
    assert "eps" not in router_of(after).attrs


@pytest.mark.parametrize(("score", "bound"), [("sigmoid", "1e-12"), ("softmax", "0.9")])
def test_clamp_that_may_act_stays_outside(score: str, bound: str) -> None:
    before = graph_of(router_text(score, False, None, "clamp").replace("1e-12", bound))
    after, _ = applied(RaiseOps(), before)
    assert_equal_results(before, after)
    assert not router_of(after).attrs["normalize"]
    assert ops(after)["clamp"] == ops(after)["div"] == 1


def test_fill_of_zero_below_softmax() -> None:
    after = checked(RaiseOps(), router_text("softmax", False, "max", None, fill="0.0"))
    assert router_of(after).attrs["group_score"] == "max"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_softmax_over_the_largest_logits(dtype: str) -> None:
    """Mixtral and gpt-oss: equal to all scores, chosen and divided by their sum."""
    text = f"""
        graph @over(%x: {dtype}[T, 12]) T=1..8 {{
          %l = mul(%x, {dtype}(0.5))
          %v, %i = topk(%l, k=3, dim=1)
          %w = softmax(%v, dim=1)
          return %w, %i
        }}"""
    after = checked(RaiseOps(), text, 1e-5 if dtype == "f32" else 2e-2)
    assert dict(router_of(after).attrs) == {
        "k": 3,
        "score": "softmax",
        "normalize": True,
        "dtype": dtype,
    }
    assert ops(after) == {"mul": 1, "router": 1}


# What was changed in the text, and the reason that is given where it still looks like a router.
MISSES: Mapping[str, tuple[str, str]] = {
    "weights with the bias in them": (
        router_text(limit=None).replace("%p = gather(%s", "%p = gather(%cb"),
        "",
    ),
    "weights that are the biased values": (
        router_text(limit=None, norm=None)
        .replace("%p = gather(%s, %i, dim=1)", "")
        .replace("%p", "%v"),
        "",
    ),
    "a fill that sigmoid with a bias may lose against": (
        router_text(fill="0.0"),
        "filled with 0.0, which might be chosen",
    ),
    "a fill that sigmoid may tie with": (
        router_text(bias=False, fill="0.0"),
        "filled with 0.0, which might be chosen",
    ),
    "a fill below softmax with a bias": (
        router_text("softmax", fill="0.0"),
        "filled with 0.0, which might be chosen",
    ),
    "groups over strides of experts": (
        router_text().replace(
            "%g = view(%cb, shape=[T, 4, 3])",
            "%gt = view(%cb, shape=[T, 3, 4])\n%g = permute(%gt, dims=[0, 2, 1])",
        ),
        "",
    ),
    "softmax over the tokens": (
        router_text("softmax", limit=None).replace("softmax(%l, dim=1)", "softmax(%l, dim=0)"),
        "not over the experts of a token",
    ),
}


@pytest.mark.parametrize("name", MISSES)
def test_declines(name: str) -> None:
    text, reason = MISSES[name]
    before = graph_of(text)
    after, log = applied(RaiseOps(), before)
    assert_equal_results(before, after, 1e-5)
    assert ops(after)["router"] == 0
    assert reason in "\n".join(log.declined)


def test_scores_that_others_use_are_declined() -> None:
    before = graph_of(router_text().replace("return %w", "return %s, %w"))
    after, log = applied(RaiseOps(), before)
    assert ops(after)["router"] == 0
    assert "used outside" in "\n".join(log.declined)


def test_topk_twice_is_not_computed_twice() -> None:
    """The values of the top-k, used beside the router, keep it from being replaced."""
    before = graph_of(router_text(limit=None).replace("return %w", "return %v, %w"))
    after, log = applied(RaiseOps(), before)
    assert ops(after)["router"] == 0
    assert_equal_results(before, after)
    assert log.declined
