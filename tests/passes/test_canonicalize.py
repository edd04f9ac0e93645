"""canonicalize: each rule where it applies, and where it all but does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from ingot.compiler.rewrite import Log
from ingot.compiler.types import VerifyError
from ingot.compiler.validate import check_rewrite
from ingot.compiler.verify import verify
from ingot.passes.raising.canonicalize import RULES, Canonicalize, common_subexpressions, simplified
from ingot.passes.raising.equal_slices import RULES as EQUAL_SLICE_RULES
from pass_checks import applied, assert_equal_results, body, graph_of, ops

HEAD = "graph @c(%x: f32[T, 4, 6], %y: f32[T, 4, 6], %i: i32[T], %b: bf16[T, 4]) T=1..8 {\n"
WHERE = "\n} where {\n@w: f32[6]\n@table: f32[8, 6]\n}"

# rule -> (a graph to which it applies, what is left of it; one to which it all but does).
CASES: dict[str, tuple[str, list[str], str]] = {
    "same-view": (
        "%0 = view(%x, shape=[T, 4, 6])\nreturn %0",
        ["return %x"],
        "%0 = view(%x, shape=[T, 6, 4])\nreturn %0",
    ),
    "view-of-view": (
        "%0 = view(%x, shape=[T, 24])\n%1 = view(%0, shape=[T, 6, 4])\nreturn %0, %1",
        ["%0 = view(%x, shape=[T, 24])", "%1 = view(%x, shape=[T, 6, 4])", "return %0, %1"],
        "%0 = permute(%x, dims=[0, 2, 1])\n%1 = view(%0, shape=[T, 24])\nreturn %1",
    ),
    "view-of-full": (
        (
            "%0 = full(value=2.0, shape=[T, 6], dtype='f32')\n%1 = view(%0, shape=[T, 2, 3])\n"
            "return %1"
        ),
        ["%0 = full(value=2.0, shape=[T, 2, 3], dtype='f32')", "return %0"],
        "%0 = exp(%x)\n%1 = view(%0, shape=[T, 24])\nreturn %1",
    ),
    "expand-of-full": (
        "%0 = full(value=2.0, shape=[6], dtype='f32')\n%1 = expand(%0, shape=[T, 6])\nreturn %1",
        ["%0 = full(value=2.0, shape=[T, 6], dtype='f32')", "return %0"],
        "%1 = expand(@w, shape=[T, 6])\nreturn %1",
    ),
    "cast-of-full": (
        "%0 = full(value=2.0, shape=[T, 6], dtype='f32')\n%1 = cast(%0, dtype='bool')\nreturn %1",
        ["%0 = full(value=True, shape=[T, 6], dtype='bool')", "return %0"],
        "%0 = cast(%x, dtype='bool')\nreturn %0",
    ),
    "logical_not-of-full": (
        (
            "%0 = full(value=True, shape=[T, 6], dtype='bool')\n%1 = logical_not(%0)\n"
            "%2 = where(%1, %0, %0)\nreturn %1"
        ),
        ["%0 = full(value=False, shape=[T, 6], dtype='bool')", "return %0"],
        "%0 = cast(%x, dtype='bool')\n%1 = logical_not(%0)\nreturn %1",
    ),
    "where-of-full": (
        (
            "%0 = full(value=False, shape=[4, 6], dtype='bool')\n%1 = where(%0, f32(-inf), %x)\n"
            "return %1"
        ),
        ["return %x"],
        (
            "%0 = full(value=False, shape=[T, 4, 6], dtype='bool')\n%1 = where(%0, %x, @w)\n"
            "return %1"
        ),
    ),
    "topk-of-one": (
        "%0 = view(%i, shape=[T, 1])\n%1, %2 = topk(%0, k=1, dim=1)\nreturn %1, %2",
        [
            "%0 = view(%i, shape=[T, 1])",
            "%1 = full(value=0, shape=[T, 1], dtype='i64')",
            "return %0, %1",
        ],
        "%0, %1 = topk(%x, k=1, dim=2)\nreturn %0, %1",
    ),
    "sum-of-one": (
        (
            "%0 = view(%i, shape=[T, 1])\n%1 = cast(%0, dtype='f32')\n"
            "%2 = sum(%1, dim=1, keepdim=False)\nreturn %2"
        ),
        [
            "%0 = view(%i, shape=[T, 1])",
            "%1 = cast(%0, dtype='f32')",
            "%2 = view(%1, shape=[T])",
            "return %2",
        ],
        "%0 = sum(%x, dim=2, keepdim=True)\nreturn %0",
    ),
    "mean-of-one": (
        "%0 = view(%x, shape=[T, 24, 1])\n%1 = mean(%0, dim=-1, keepdim=True)\nreturn %1",
        ["%0 = view(%x, shape=[T, 24, 1])", "return %0"],
        "%0 = mean(%x, dim=2, keepdim=True)\nreturn %0",
    ),
    "amax-of-one": (
        "%0 = view(%x, shape=[T, 24, 1])\n%1 = amax(%0, dim=-1, keepdim=True)\nreturn %1",
        ["%0 = view(%x, shape=[T, 24, 1])", "return %0"],
        "%0 = amax(%x, dim=2, keepdim=True)\nreturn %0",
    ),
    "outer-product": (
        (
            "%0 = view(%x, shape=[T, 24, 1])\n%1 = view(@w, shape=[1, 6])\n"
            "%2 = matmul(%0, %1)\nreturn %2"
        ),
        [
            "%0 = view(%x, shape=[T, 24, 1])",
            "%1 = view(@w, shape=[1, 6])",
            "%2 = mul(%0, %1)",
            "return %2",
        ],
        "%0 = permute(@table, dims=[1, 0])\n%1 = matmul(%x, %0)\nreturn %1",
    ),
    "scatter-everywhere": (
        (
            "%0 = view(@w, shape=[6, 1])\n%1 = full(value=0, shape=[6, 1], dtype='i64')\n"
            "%2 = scatter(%0, %1, dim=1, value=3) : f32[6, 1]\nreturn %2"
        ),
        ["%0 = full(value=3, shape=[6, 1], dtype='f32')", "return %0"],
        (
            "%1 = full(value=0, shape=[8, 1], dtype='i64')\n"
            "%2 = scatter(@table, %1, dim=1, value=3)\nreturn %2"
        ),
    ),
    "permute-of-permute": (
        "%0 = permute(%x, dims=[1, 2, 0])\n%1 = permute(%0, dims=[0, 2, 1])\nreturn %1",
        ["%0 = permute(%x, dims=[1, 0, 2])", "return %0"],
        "%0 = permute(%x, dims=[1, 2, 0])\nreturn %0",
    ),
    "trivial-permute": (
        "%0 = permute(%x, dims=[0, 1, 2])\nreturn %0",
        ["return %x"],
        "%0 = permute(%x, dims=[0, 2, 1])\nreturn %0",
    ),
    "same-expand": (
        "%0 = expand(%x, shape=[T, 4, 6])\nreturn %0",
        ["return %x"],
        "%0 = expand(%i, shape=[4, T])\nreturn %0",
    ),
    "permute-of-mean": (
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = mean(%0, dim=-1, keepdim=False)\n"
            "%2 = permute(%1, dims=[1, 0])\nreturn %2"
        ),
        ["%0 = mean(%x, dim=-1, keepdim=False)", "return %0"],
        "%0 = mean(%x, dim=0, keepdim=False)\n%1 = permute(%0, dims=[1, 0])\nreturn %1",
    ),
    "permute-of-softmax": (
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = softmax(%0, dim=2)\n"
            "%2 = permute(%1, dims=[1, 0, 2])\nreturn %2"
        ),
        ["%0 = softmax(%x, dim=2)", "return %0"],
        "%0 = softmax(%x, dim=2)\n%1 = permute(%0, dims=[1, 2, 0])\nreturn %1",
    ),
    "permute-of-view": (
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = view(%0, shape=[4, T, 3, 2])\n"
            "%2 = permute(%1, dims=[1, 0, 2, 3])\nreturn %2"
        ),
        ["%0 = view(%x, shape=[T, 4, 3, 2])", "return %0"],
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = view(%0, shape=[2, 2, T, 6])\n"
            "%2 = permute(%1, dims=[1, 0, 2, 3])\nreturn %2"
        ),
    ),
    "permute-of-expand": (
        "%0 = expand(@w, shape=[T, 4, 6])\n%1 = permute(%0, dims=[1, 0, 2])\nreturn %1",
        ["%0 = expand(@w, shape=[4, T, 6])", "return %0"],
        "%0 = expand(@w, shape=[T, 4, 6])\nreturn %0",
    ),
    "permute-of-add": (
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = permute(%y, dims=[1, 0, 2])\n%2 = add(%0, %1)\n"
            "%3 = permute(%2, dims=[1, 0, 2])\nreturn %3"
        ),
        ["%0 = add(%x, %y)", "return %0"],
        "%0 = add(%x, %y)\n%1 = permute(%0, dims=[1, 0, 2])\nreturn %1",
    ),
    "permute-of-mul": (
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = mul(%0, @w)\n%2 = mul(%1, f32(0.5))\n"
            "%3 = permute(%2, dims=[1, 0, 2])\nreturn %3"
        ),
        ["%0 = mul(%x, @w)", "%1 = mul(%0, f32(0.5))", "return %1"],
        "%0 = mul(%x, @w)\n%1 = permute(%0, dims=[1, 0, 2])\nreturn %1",
    ),
    "permute-of-slice": (
        (
            "%0 = permute(%x, dims=[1, 2, 0])\n%1 = slice(%0, dim=1, start=2, stop=5)\n"
            "%2 = permute(%1, dims=[2, 0, 1])\nreturn %2"
        ),
        ["%0 = slice(%x, dim=2, start=2, stop=5)", "return %0"],
        "%0 = slice(%x, dim=1, start=0, stop=2)\n%1 = permute(%0, dims=[2, 0, 1])\nreturn %1",
    ),
    "permute-of-cat": (
        (
            "%0 = permute(%x, dims=[1, 0, 2])\n%1 = permute(%y, dims=[1, 0, 2])\n"
            "%2 = cat(%0, %1, dim=0)\n%3 = permute(%2, dims=[1, 0, 2])\nreturn %3"
        ),
        ["%0 = cat(%x, %y, dim=1)", "return %0"],
        "%0 = cat(%x, %y, dim=1)\n%1 = permute(%0, dims=[1, 0, 2])\nreturn %1",
    ),
    "same-slice": (
        "%0 = slice(%x, dim=1, start=0, stop=4)\nreturn %0",
        ["return %x"],
        "%0 = slice(%x, dim=1, start=0, stop=3)\nreturn %0",
    ),
    "slice-of-slice": (
        (
            "%0 = slice(%x, dim=2, start=1, stop=6)\n"
            "%1 = slice(%0, dim=-1, start=1, stop=5, step=2)\nreturn %1"
        ),
        ["%0 = slice(%x, dim=2, start=2, stop=6, step=2)", "return %0"],
        "%0 = slice(%x, dim=2, start=1, stop=6)\n%1 = slice(%0, dim=1, start=1, stop=3)\nreturn %1",
    ),
    "slice-of-cat": (
        (
            "%0 = cat(%x, %y, dim=1)\n%1 = slice(%0, dim=1, start=2, stop=6)\n"
            "%2 = slice(%0, dim=1, start=5, stop=8)\nreturn %1, %2"
        ),
        [
            "%0 = slice(%x, dim=1, start=2, stop=4)",
            "%1 = slice(%y, dim=1, start=0, stop=2)",
            "%2 = cat(%0, %1, dim=1)",
            "%3 = slice(%y, dim=1, start=1, stop=4)",
            "return %2, %3",
        ],
        "%0 = cat(%x, %y, dim=1)\n%1 = slice(%0, dim=2, start=2, stop=6)\nreturn %1",
    ),
    "scatter-as-cat": (
        (
            "%0 = slice(%y, dim=2, start=0, stop=2)\n"
            "%1 = slice_scatter(%x, %0, dim=2, start=1, stop=3)\nreturn %1"
        ),
        [
            "%0 = slice(%x, dim=2, start=0, stop=1)",
            "%1 = slice(%y, dim=2, start=0, stop=2)",
            "%2 = slice(%x, dim=2, start=3, stop=6)",
            "%3 = cat(%0, %1, %2, dim=2)",
            "return %3",
        ],
        (
            "%0 = slice(%y, dim=2, start=0, stop=3)\n"
            "%1 = slice_scatter(%x, %0, dim=2, start=0, stop=6, step=2)\nreturn %1"
        ),
    ),
    "simpler-cat": (
        (
            "%0 = slice(%x, dim=2, start=1, stop=2)\n%1 = slice(%x, dim=2, start=2, stop=5)\n"
            "%2 = cat(%0, %1, dim=2)\n%3 = cat(%y, %0, %1, dim=2)\nreturn %2, %3"
        ),
        [
            "%0 = slice(%x, dim=2, start=1, stop=5)",
            "%1 = cat(%y, %0, dim=2)",
            "return %0, %1",
        ],
        (
            "%0 = slice(%x, dim=2, start=1, stop=2)\n%1 = slice(%x, dim=2, start=2, stop=3)\n"
            "%2 = cat(%1, %0, dim=2)\n%3 = cat(%0, %1, dim=1)\nreturn %2, %3"
        ),
    ),
    "same-cast": (
        "%0 = cast(%x, dtype='f32')\nreturn %0",
        ["return %x"],
        "%0 = cast(%x, dtype='f64')\nreturn %0",
    ),
    "cast-of-cast": (
        (
            "%0 = cast(%b, dtype='f32')\n%1 = cast(%0, dtype='bf16')\n%2 = cast(%0, dtype='f16')\n"
            "return %1, %2"
        ),
        ["%0 = cast(%b, dtype='f16')", "return %b, %0"],
        "%0 = cast(%x, dtype='bf16')\n%1 = cast(%0, dtype='f32')\nreturn %1",
    ),
    "lookup-without-cast": (
        "%0 = cast(%i, dtype='i64')\n%1 = embedding(%0, @table)\nreturn %1",
        ["%0 = embedding(%i, @table)", "return %0"],
        "%0 = cast(%x, dtype='bf16')\n%1 = cast(%i, dtype='i64')\nreturn %0, %1",
    ),
    "mul-1": (
        "%0 = mul(f32(1.0), %x)\nreturn %0",
        ["return %x"],
        "%0 = mul(%x, f32(1.5))\nreturn %0",
    ),
    "div-1": (
        "%0 = div(%x, f32(1.0))\nreturn %0",
        ["return %x"],
        "%0 = div(f32(1.0), %x)\nreturn %0",
    ),
    "add-0": (
        "%0 = add(f32(0.0), %x)\nreturn %0",
        ["return %x"],
        "%0 = add(%x, f32(1.0))\nreturn %0",
    ),
    "sub-0": (
        "%0 = sub(%x, f32(0.0))\nreturn %0",
        ["return %x"],
        "%0 = sub(f32(0.0), %x)\nreturn %0",
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_applies(rule: str) -> None:
    text, expected, _ = CASES[rule]
    before = graph_of(HEAD + text + WHERE)
    after = simplified(before, log := Log())
    verify(after)
    assert_equal_results(before, after)
    assert log.matches[rule]
    assert body(after) == expected


@pytest.mark.parametrize("rule", CASES)
def test_leaves_alone(rule: str) -> None:
    before = graph_of(HEAD + CASES[rule][2] + WHERE)
    after, log = applied(Canonicalize(), before)
    assert_equal_results(before, after)
    assert not log.matches[rule]
    assert ops(after) == ops(before)


def test_every_kind_of_rule_is_tested() -> None:
    """Of the rules that move a permute there is one an op; four stand for all.

    Those of mxfp4_views and equal_slices have tests of their own.
    """
    elsewhere = ("permute-of-", "mxfp4-", *(rule.name for rule in EQUAL_SLICE_RULES))
    assert {r.name for r in RULES if not r.name.startswith(elsewhere)} <= CASES.keys()
    assert {r for r in CASES if r.startswith("permute-of-")} <= {r.name for r in RULES}


def test_equal_nodes_are_merged() -> None:
    before = graph_of(
        HEAD
        + "%0 = mul(%x, %y)\n%1 = mul(%y, %x)\n%2 = sub(%x, %y)\n%3 = sub(%y, %x)\n"
        + "%4 = add(%0, %1)\n%5 = topk(%x, k=2, dim=2)\n".replace("%5 =", "%5, %6 =")
        + "%7, %8 = topk(%x, k=2, dim=2)\nreturn %4, %2, %3, %5, %8"
        + WHERE
    )
    after, log = applied(Canonicalize(), before)
    assert_equal_results(before, after)
    assert ops(after) == {"mul": 1, "sub": 2, "add": 1, "topk": 1}
    assert log.matches["common-subexpression"]


def test_a_merge_of_nodes_that_differ_is_told() -> None:
    text = "%0 = exp(%x)\n%1 = exp(%x)\n%2 = mul(%0, %y)\n%3 = mul(%1, %y)\n%4 = sub(%2, %y)\n"
    graph = graph_of(HEAD + text + "return %3, %4, %2" + WHERE)
    common_subexpressions(graph, log := Log())
    assert [a.before[0].op.name for a in log.applied] == ["exp", "mul"]
    for one in log.applied:
        check_rewrite(graph, one)
        with pytest.raises(VerifyError, match="rule common-subexpression changes a result"):
            check_rewrite(graph, replace(one, after=(graph.outputs[1],)))


def test_equal_numbers_of_two_types_are_not_merged() -> None:
    before = graph_of(HEAD + "%0 = mul(%x, f32(2))\n%1 = mul(%x, f32(2.0))\nreturn %0, %1" + WHERE)
    assert ops(applied(Canonicalize(), before)[0]) == {"mul": 2}


def test_what_nothing_uses_goes() -> None:
    before = graph_of(HEAD + "%0 = exp(%x)\n%1 = exp(%y)\nreturn %1" + WHERE)
    assert body(applied(Canonicalize(), before)[0]) == ["%0 = exp(%y)", "return %0"]


def test_a_permute_that_cancels_nothing_is_not_moved() -> None:
    """It would only have more operands to move."""
    text = "%0 = add(%x, %y)\n%1 = exp(%0)\n%2 = permute(%1, dims=[1, 0, 2])\nreturn %2"
    before = graph_of(HEAD + text + WHERE)
    assert body(applied(Canonicalize(), before)[0])[2] == "%2 = permute(%1, dims=[1, 0, 2])"


def test_an_outer_product_is_turned() -> None:
    """Frequencies by positions become positions by frequencies."""
    text = "%0 = cast(%i, dtype='f32')\n%1 = view(@w, shape=[6, 1])\n%2 = mul(%1, %0)\n"
    before = graph_of(HEAD + text + "%3 = permute(%2, dims=[1, 0])\nreturn %3" + WHERE)
    after, _ = applied(Canonicalize(), before)
    assert_equal_results(before, after)
    assert body(after) == [
        "%0 = cast(%i, dtype='f32')",
        "%1 = view(%0, shape=[T, 1])",
        "%2 = mul(@w, %1)",
        "return %2",
    ]


def test_a_slice_of_a_slice_with_a_step_stays() -> None:
    text = (
        "%0 = slice(%x, dim=2, start=0, stop=6, step=2)\n%1 = slice(%0, dim=2, start=1, stop=3)\n"
    )
    before = graph_of(HEAD + text + "return %1" + WHERE)
    after, log = applied(Canonicalize(), before)
    assert_equal_results(before, after)
    assert not log.matches["slice-of-slice"]


def test_twice_is_once() -> None:
    for text, _, other in CASES.values():
        once, _ = applied(Canonicalize(), graph_of(HEAD + text + WHERE))
        twice = simplified(once, log := Log())
        assert twice is once and not log.matches
        other_once, _ = applied(Canonicalize(), graph_of(HEAD + other + WHERE))
        assert str(applied(Canonicalize(), other_once)[0]) == str(other_once)


def test_traced_attention_block(golden: Callable[[str], None]) -> None:
    """Batch of one, heads brought to the front and back, halves cut and joined again."""
    before = graph_of("""
        graph @block(%ids: i32[T]) T=1..8 {
          %0 = cast(%ids, dtype='i64')
          %1 = view(%0, shape=[1, T])
          %2 = embedding(%1, @table)
          %3 = linear(%2, @w)
          %4 = view(%3, shape=[1, T, 2, 4])
          %5 = permute(%4, dims=[0, 2, 1, 3])
          %6 = slice(%5, dim=3, start=0, stop=2)
          %7 = slice(%5, dim=3, start=2, stop=4)
          %8 = cat(%6, %7, dim=3)
          %9 = permute(%8, dims=[0, 2, 1, 3])
          %10 = view(%9, shape=[T, 2, 4])
          %11 = attention(%10, %10, %10, scale=0.5)
          %12 = view(%11, shape=[1, T, 2, 4])
          %13 = view(%12, shape=[1, T, 8])
          %14 = cast(%13, dtype='f32')
          %15 = mul(%14, f32(1))
          %16 = add(%2, %15)
          return %16
        } where {
          @table: f32[8, 8]
          @w: f32[8, 8]
        }""")
    after, _ = applied(Canonicalize(), before)
    assert_equal_results(before, after)
    golden(str(after))
