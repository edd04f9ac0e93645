"""fuse-moe-gating: the router and its product in one op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.ir import Graph, Node
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.validate import check_rewrite
from ingot.passes.fusion.fuse_moe_gating import FuseMoeGating
from ingot.passes.fusion.fuse_norm_linear import FuseNormLinear
from pass_checks import applied, assert_equal_results, checked, graph_of, ops
from serving_checks import assert_same_logits, cached, traced

PASS = FuseMoeGating()
GRAPH = """
    graph @gate(%x: {dtype}[T, 8]{params}) T=1..8 {{
      {lines}
      return {results}
    }} where {{
      @gate: {dtype}[6, 8]
      @gate32: f32[6, 8]
      @bias: {dtype}[6]
      @correction: f32[6]
      @norm: {dtype}[8]
      @up: {dtype}[6, 12, 8]
      @down: {dtype}[6, 8, 6]
    }}"""
ROUTE = "%w, %i = router(%l{correction}, k=2, score='{score}', normalize=True, dtype='f32'{more})"


def text(lines: str, dtype: str = "f32", results: str = "%w, %i", params: str = "") -> str:
    return GRAPH.format(lines=lines, dtype=dtype, results=results, params=params)


def route(score: str = "softmax", correction: str = "", more: str = "") -> str:
    return ROUTE.format(score=score, correction=correction, more=more)


def gating(graph: Graph) -> Node:
    (node,) = (n for n in graph.nodes() if n.op.name == "moe_gating")
    return node


def test_widened(golden: Callable[[str], None]) -> None:
    """A bf16 weight and bias stay what they are; the f32 correction too."""
    lines = """
        %xf = cast(%x, dtype='f32')
        %wf = cast(@gate, dtype='f32')
        %bf = cast(@bias, dtype='f32')
        %l = linear(%xf, %wf, bias=%bf)
        """ + route("sigmoid", ", correction=@correction", ", scale=2.5, eps=1e-20")
    golden(str(checked(PASS, text(lines, "bf16"))))


WIDEN = "%xf = cast(%x, dtype='f32')\n"
FORMS = {
    "plain": ("%l = linear(%x, @gate)\n" + route(), {"logits": "f32", "given": ()}),
    "bias": ("%l = linear(%x, @gate, bias=@bias)\n" + route(), {"given": ("bias",)}),
    "groups": (
        "%l = linear(%x, @gate)\n"
        + route("softmax", "", ", groups=3, topk_groups=2, group_score='top2'"),
        {"groups": 3, "topk_groups": 2, "group_score": "top2"},
    ),
    "shared": ("%l = linear(%x, @gate)\n" + route("sigmoid", "", ", shared=2"), {"shared": 2}),
    "eps": (
        "%l = linear(%x, @gate)\n" + route("sigmoid", ", correction=@correction", ", eps=0.5"),
        {"sum_eps": 0.5, "eps": None, "given": ("correction",)},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    lines, expected = FORMS[name]
    after = checked(PASS, text(lines))
    assert ops(after) == {"moe_gating": 1}
    said = {"given": gating(after).given, **gating(after).attrs}
    assert {key: said.get(key) for key in expected} == expected


def test_a_wide_weight_is_not_narrowed() -> None:
    """ERNIE's router weight is f32 in a bf16 model."""
    after = checked(PASS, text(WIDEN + "%l = linear(%xf, @gate32)\n" + route(), "bf16"))
    assert gating(after).args[1].type.dtype == "f32"
    assert gating(after).args[0].type.dtype == "bf16"
    assert ops(after) == {"moe_gating": 1}


def test_a_narrowed_weight_is_not_widened() -> None:
    """What the model rounded stays rounded: in memory too."""
    lines = "%wb = cast(@gate32, dtype='bf16')\n%l = linear(%x, %wb)\n" + route()
    after = checked(PASS, text(lines, "bf16"), 1e-2)
    assert gating(after).args[1].op.name == "cast"
    assert gating(after).attrs["logits"] == "bf16"


EXPERTS = "\n%y = experts(%h, %w, %i, @up, @down, activation='silu')"


def test_with_a_norm_that_the_experts_read_too(golden: Callable[[str], None]) -> None:
    lines = "%h = rms_norm(%x, weight=@norm, eps=0.1)\n%l = linear(%h, @gate)\n" + route() + EXPERTS
    before = graph_of(text(lines, results="%y"))
    after = run_pipeline(before, (PASS, FuseNormLinear()))[-1].graph
    assert_equal_results(before, after)
    golden(str(after))


def test_with_a_sum_and_norms() -> None:
    lines = (
        "%p = rms_norm(%d, weight=@norm, eps=0.2)\n%s = add(%x, %p)\n"
        "%h = rms_norm(%s, weight=@norm, eps=0.1)\n"
        "%l = linear(%h, @gate)\n" + route() + EXPERTS + "\n%z = add(%s, %y)"
    )
    before = graph_of(text(lines, results="%z", params=", %d: f32[T, 8]"))
    after = run_pipeline(before, (PASS, FuseNormLinear()))[-1].graph
    assert_equal_results(before, after)
    assert ops(after) == {"moe_gating": 1, "experts": 1, "add": 1}
    assert gating(after).given == ("norm", "delta", "post_norm")


DECLINES = {
    "logits that others use": ("%l = linear(%x, @gate)\n" + route(), "%w, %i, %l", "linear inside"),
    "soft-capped logits": (
        "%m = linear(%x, @gate)\n%l = tanh(%m)\n" + route(),
        "%w, %i",
        "tanh gives its logits",
    ),
    "a cast that others use": (
        WIDEN.replace("f32", "f64")
        + "%wf = cast(@gate, dtype='f64')\n%l = linear(%xf, %wf)\n"
        + route(),
        "%w, %i, %xf",
        None,
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, results, reason = DECLINES[name]
    before = graph_of(text(lines, results=results))
    after, log = applied(PASS, before)
    assert_equal_results(before, after)
    if reason is None:  # the cast is an input then
        assert gating(after).args[0].op.name == "cast"
        return
    assert ops(after) == ops(before)
    assert reason in "\n".join(log.declined)


# ---- traced models

LAYERS = {
    **dict.fromkeys(("qwen3_moe", "mixtral", "gpt_oss", "olmoe"), 2),
    **dict.fromkeys(("ernie4_5_moe", "glm4_moe", "deepseek_v2", "deepseek_v3", "dots1"), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_traced(name: str) -> None:
    plain, weights = traced(name)
    for before in (plain, cached(plain)):
        results = run_pipeline(before, (PASS, FuseNormLinear()))
        assert results[0].matches == {"moe-gating": LAYERS[name]}
        assert results[1].matches["norm-moe_gating"] == LAYERS[name]
        assert "router" not in ops(results[1].graph)
        for step in results:
            assert_same_logits(before, step.graph, weights)


# The dtype in which each model multiplies, and in which it keeps the router's weight.
IN_BF16 = {
    "mixtral": ("bf16", "bf16"),
    "gpt_oss": ("bf16", "bf16"),
    "ernie4_5_moe": ("f32", "f32"),
    "glm4_moe": ("f32", "bf16"),
}


@pytest.mark.parametrize("name", IN_BF16)
def test_traced_in_bf16(name: str) -> None:
    before, _ = traced(name, "bf16")
    result = run_pipeline(cached(before), (PASS,), check=check_rewrite)[-1]
    gates = [n for n in result.graph.nodes() if n.op.name == "moe_gating"]
    assert len(gates) == LAYERS[name]
    for node in gates:
        assert (node.attrs["logits"], node.args[1].type.dtype) == IN_BF16[name]
        correction = node.operand("correction")
        assert correction is None or correction.type.dtype == "f32"
