"""fuse-shared-experts: an MLP beside the experts becomes experts that every token has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.compiler.validate import check_rewrite
from ingot.passes.fusion.fuse_moe_gating import FuseMoeGating
from ingot.passes.fusion.fuse_shared_experts import FuseSharedExperts
from pass_checks import applied, assert_equal_results, checked, graph_of, ops
from serving_checks import assert_same_logits, cached, traced

PASS = FuseSharedExperts()
GRAPH = """
    graph @moe(%x: f32[T, 8], %rows: i32[T]) T=1..8 {{
      %l = linear(%x, @gate)
      %w, %i = router(%l, k=2, score='softmax', normalize=True, dtype='f32')
      {lines}
      return {results}
    }} where {{
      @gate: f32[4, 8]
      @up: f32[4, 12, 8]
      @down: f32[4, 8, 6]
      @ub: f32[4, 12]
      @db: f32[4, 8]
      @sg: f32[{width}, 8]
      @su: f32[{width}, 8]
      @sd: f32[8, {width}]
      @sgu: f32[{both}, 8]
      @sgb: f32[{width}]
      @sub: f32[{width}]
      @sdb: f32[8]
    }}"""
ROUTED = "%e = experts(%x, %w, %i, @up, @down, activation='silu')\n"
SHARED = """
    %g = linear(%x, @sg)
    %u = linear(%x, @su)
    %a = glu(%g, %u, activation='silu')
    %d = linear(%a, @sd)
    """
ADDED = "%y = add(%e, %d)"
BIASED = ROUTED.replace("@down,", "@down, gate_up_bias=@ub, down_bias=@db,") + SHARED.replace(
    "@sg)", "@sg, bias=@sgb)"
).replace("@su)", "@su, bias=@sub)").replace("@sd)", "@sd, bias=@sdb)")


def text(lines: str, width: int = 6, results: str = "%y") -> str:
    return GRAPH.format(lines=lines, width=width, both=2 * width, results=results)


def shared(graph: Graph) -> int:
    (router,) = (n for n in graph.nodes() if n.op.name == "router")
    return router.attrs.get("shared", 0)


def test_one(golden: Callable[[str], None]) -> None:
    golden(str(checked(PASS, text(ROUTED + SHARED + ADDED))))


def test_several(golden: Callable[[str], None]) -> None:
    """A width of three experts, and biases: the last one is added once."""
    golden(str(checked(PASS, text(BIASED + ADDED, 18))))


FORMS = {
    "the MLP first": (ROUTED + SHARED + "%y = add(%d, %e)", 12),
    "biases of one": (BIASED + ADDED, 6),
    "columns of one product": (
        ROUTED
        + SHARED.replace("%g = linear(%x, @sg)", "%b = linear(%x, @sgu)").replace(
            "%u = linear(%x, @su)",
            "%g = slice(%b, dim=1, start=0, stop=12)\n%u = slice(%b, dim=1, start=12, stop=24)",
        )
        + ADDED,
        12,
    ),
    "columns in turn": (
        ROUTED
        + SHARED.replace("%g = linear(%x, @sg)", "%b = linear(%x, @sgu)").replace(
            "%u = linear(%x, @su)",
            "%g = slice(%b, dim=1, start=0, stop=24, step=2)\n"
            "%u = slice(%b, dim=1, start=1, stop=24, step=2)",
        )
        + ADDED,
        12,
    ),
    "rows that were taken": (
        "%xt = take(%x, %rows)\n%wt = take(%w, %rows)\n%it = take(%i, %rows)\n"
        + ROUTED.replace("%x, %w, %i", "%xt, %wt, %it")
        + SHARED.replace("%x,", "%xt,")
        + ADDED,
        12,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    lines, width = FORMS[name]
    before = graph_of(text(lines, width))
    after, log = applied(PASS, before)
    assert log.matches == {"shared-experts": 1}
    assert shared(after) == width // 6
    assert "glu" not in ops(after)
    # Rows are drawn below 8.
    assert_equal_results(before, after, sizes=(8,) if "%rows)" in lines else (1, 3, 8))


DECLINES = {
    "a gated shared expert": (
        ROUTED
        + SHARED
        + "%s = slice(%x, dim=1, start=0, stop=1)\n%t = sigmoid(%s)\n%z = mul(%t, %d)\n"
        "%y = add(%e, %z)",
        6,
        "mul is added to it",
    ),
    "another activation": (ROUTED + SHARED.replace("silu", "gelu") + ADDED, 6, "experts have"),
    "another width": (ROUTED + SHARED + ADDED, 8, "8 is no multiple of the experts' 6"),
    "another x": (
        ROUTED + SHARED.replace("%x,", "%x2,").replace("%g =", "%x2 = tanh(%x)\n%g =") + ADDED,
        6,
        "linear is added to it",
    ),
    "biases of the experts alone": (
        ROUTED.replace("@down,", "@down, gate_up_bias=@ub, down_bias=@db,") + SHARED + ADDED,
        6,
        "biases, others have none",
    ),
    "biases of the shared one alone": (
        BIASED.replace("@down, gate_up_bias=@ub, down_bias=@db,", "@down,") + ADDED,
        6,
        "biases, others have none",
    ),
    "some biases": (BIASED.replace("@su, bias=@sub", "@su") + ADDED, 6, "biases, others have none"),
    "ungated experts": (
        "%half = slice(@up, dim=1, start=0, stop=6)\n"
        + ROUTED.replace("@up", "%half").replace("'silu'", "'silu', gated=False")
        + SHARED
        + ADDED,
        6,
        "experts are not gated",
    ),
    "shared experts already": (
        "%w3, %i3 = router(%l, k=1, score='softmax', normalize=True, dtype='f32', shared=1)\n"
        + ROUTED.replace("%w, %i", "%w3, %i3")
        + SHARED
        + ADDED,
        6,
        "have shared experts already",
    ),
    "weights of two routers": (
        "%w3, %i3 = router(%l, k=2, score='sigmoid', normalize=True, dtype='f32')\n"
        + ROUTED.replace("%w, %i", "%w, %i3")
        + SHARED
        + ADDED,
        6,
        "are not one router's",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, width, reason = DECLINES[name]
    before = graph_of(text(lines, width))
    after, log = applied(PASS, before)
    assert after is before
    assert reason in "\n".join(log.declined)


@pytest.mark.parametrize("used", ["%w", "%i", "%e", "%d", "%a"])
def test_declines_what_others_use(used: str) -> None:
    before = graph_of(text(ROUTED + SHARED + ADDED, results=f"%y, {used}"))
    after, log = applied(PASS, before)
    assert after is before
    assert "inside the match is used outside" in "\n".join(log.declined)


# ---- packed weights

PACKED = """
    graph @moe(%x: f32[T, 64], %w: f32[T, 1]) T=1..8 {{
      %l = linear(%x, @gate)
      %w1, %i = router(%l, k=2, score='softmax', normalize=True, dtype='f32')
      %up = mxfp4(@uc, @us, dtype='f32')
      %down = mxfp4(@dc, @ds, dtype='f32')
      %sg = {gate}
      %su = mxfp4(@suc, @sus, dtype='f32')
      %sd = mxfp4(@sdc, @sds, dtype='f32')
      %e = experts(%x, %w1, %i, %up, %down, activation='silu')
      %g = linear(%x, %sg)
      %u = linear(%x, %su)
      %a = glu(%g, %u, activation='silu')
      %d = linear(%a, %sd)
      %y = add(%e, %d)
      return %y
    }} where {{
      @gate: f32[4, 64]
      @uc: u8[4, {two}, 32]
      @us: u8[4, {two}, 2]
      @dc: u8[4, 64, {half}]
      @ds: u8[4, 64, {groups}]
      @plain: f32[64, 64]
      @suc: u8[64, 32]
      @sus: u8[64, 2]
      @sdc: u8[64, 32]
      @sds: u8[64, 2]
    }}"""


def packed(gate: str = "mxfp4(@suc, @sus, dtype='f32')") -> str:
    """Experts of 32 beside an MLP of 64: one group of a down row is one expert's."""
    return PACKED.format(gate=gate, two=64, half=16, groups=1)


def test_packed_weights_stay_packed() -> None:
    before = graph_of(packed())
    after, log = applied(PASS, before)
    assert log.matches == {"shared-experts": 1}
    check_rewrite(before, log.applied[0])
    (node,) = (n for n in after.nodes() if n.op.name == "experts")
    assert [a.op.name for a in node.args[3:]] == ["mxfp4", "mxfp4"]
    assert [a.type.shape for a in node.args[3:]] == [(6, 64, 64), (6, 64, 32)]


def test_declines_packed_experts_and_a_plain_mlp() -> None:
    after, log = applied(PASS, graph_of(packed("exp(@plain)")))
    assert "weights in several formats" in "\n".join(log.declined)
    assert ops(after)["glu"] == 1


# ---- traced models


@pytest.mark.parametrize(
    "name", ["ernie4_5_moe", "glm4_moe", "deepseek_v2", "deepseek_v3", "dots1"]
)
def test_traced(name: str) -> None:
    plain, weights = traced(name)
    for before in (plain, cached(plain)):
        results = run_pipeline(before, (PASS, FuseMoeGating()))
        assert results[0].matches == {"shared-experts": 1}
        assert results[1].matches == {"moe-gating": 1}
        for step in results:
            assert_same_logits(before, step.graph, weights)


def test_traced_with_two_shared_experts() -> None:
    plain, weights = traced("deepseek_v3", n_shared_experts=2)
    result = run_pipeline(cached(plain), (PASS,), check=check_rewrite)[-1]
    assert shared(result.graph) == 2
    assert_same_logits(cached(plain), result.graph, weights)


def test_traced_without_shared_experts() -> None:
    plain, _ = traced("qwen3_moe")
    result = run_pipeline(plain, (PASS,))[-1]
    assert (result.graph, result.declined) == (plain, ())
