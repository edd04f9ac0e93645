"""fuse-linear-residual: what is added to a product is added by the product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.passes.fusion.fuse_linear_residual import FuseLinearResidual
from pass_checks import applied, body, checked, forms, graph_of

GRAPH = """
    graph @block(%x: f32[T, 8], %y: f32[T, 6], %p: f32[T, 2], %i: i64[T, 2]) T=1..8 {{
      {lines}
      return %r{more}
    }} where {{
      @w: f32[8, 8]
      @v: f32[8, 6]
      @b: f32[8]
      @up: f32[8, 12, 8]
      @down: f32[8, 8, 6]
      @up_bias: f32[8, 12]
      @down_bias: f32[8, 8]
    }}"""
L = "%l = linear(%y, @v)\n"
E = "%e = experts(%x, %p, %i, @up, @down, activation='silu')\n"
ROUTED = E.replace("@down,", "@down, gate_up_bias=@up_bias, down_bias=@down_bias,")


def text(lines: str, more: str = "") -> str:
    return GRAPH.format(lines=lines, more=more)


@pytest.mark.parametrize("lines", [L, L.replace("@v)", "@v, bias=@b)")], ids=["", "bias"])
@pytest.mark.parametrize("order", ["%l, %x", "%x, %l"])
def test_linear_in_either_order(lines: str, order: str) -> None:
    after = checked(FuseLinearResidual(), text(f"{lines}%r = add({order})"))
    assert forms(after) == {"linear bias residual" if "@b" in lines else "linear residual": 1}


@pytest.mark.parametrize("lines", [E, ROUTED], ids=["", "biases"])
@pytest.mark.parametrize("order", ["%e, %x", "%x, %e"])
def test_experts_in_either_order(lines: str, order: str) -> None:
    after = checked(FuseLinearResidual(), text(f"{lines}%r = add({order})"))
    biases = "gate_up_bias down_bias " if "bias" in lines else ""
    assert forms(after) == {f"experts {biases}residual": 1}


def test_a_residual_that_is_computed() -> None:
    after = checked(FuseLinearResidual(), text(L + "%t = tanh(%x)\n%r = add(%t, %l)"))
    assert forms(after) == {"tanh": 1, "linear residual": 1}


def test_a_chain_of_residuals(golden: Callable[[str], None]) -> None:
    lines = f"""{L}%s = add(%x, %l)
        %m = linear(%s, @w, bias=@b)
        %u = add(%m, %s)
        {ROUTED.replace("%x", "%u")}
        %r = add(%u, %e)"""
    golden(str(checked(FuseLinearResidual(), text(lines))))


def test_of_two_products_the_first_takes_the_other() -> None:
    lines = L + "%m = linear(%x, @w)\n%r = add({})"
    for order, weight in (("%l, %m", "@v"), ("%m, %l", "@w")):
        after = checked(FuseLinearResidual(), text(lines.format(order)))
        assert forms(after) == {"linear": 1, "linear residual": 1}
        assert weight in body(after)[1]


def test_of_two_products_the_one_that_the_other_reads_is_the_residual() -> None:
    lines = L + "%m = linear(%l, @w)\n%r = add(%l, %m)"
    after = checked(FuseLinearResidual(), text(lines))
    assert body(after)[1] == "%1 = linear(%0, @w, residual=%0)"


@pytest.mark.parametrize("sum_", ["%s, %x", "%x, %s"])
@pytest.mark.parametrize("pair", ["%l, %e", "%e, %l"])
def test_two_products_and_a_residual(pair: str, sum_: str) -> None:
    """Routed experts, a shared expert and the residual stream: one after the other."""
    after = checked(FuseLinearResidual(), text(f"{L}{E}%s = add({pair})\n%r = add({sum_})"))
    assert forms(after) == {"linear residual": 1, "experts residual": 1}


def test_a_residual_of_two_products_that_is_used_elsewhere() -> None:
    after = checked(FuseLinearResidual(), text(f"{L}{E}%s = add(%l, %e)\n%r = add(%s, %x)", ", %s"))
    assert forms(after) == {"linear residual": 1, "experts": 1, "add": 1}


def test_parallel_branches() -> None:
    after = checked(FuseLinearResidual(), text(f"{L}{E}%s = add(%x, %l)\n%r = add(%s, %e)"))
    assert forms(after) == {"linear residual": 1, "experts residual": 1}


DECLINES = {
    "the product has another user": (L + "%r = add(%l, %x)", ", %l", "used outside"),
    "scaled": (L + "%m = mul(%l, f32(0.5))\n%r = add(%x, %m)", "", "scaled before the residual"),
    "scaled experts": (E + "%m = mul(f32(0.5), %e)\n%r = add(%m, %x)", "", "scaled before"),
    "a row": (L + "%r = add(%l, @b)", "", "f32[8] is broadcast to f32[T, 8]"),
    "a number": (L + "%r = add(%l, f32(1.5))", "", "f32[] is broadcast to f32[T, 8]"),
    "itself": (L + "%r = add(%l, %l)", "", "added to itself"),
    "two of one": (L + "%s = add(%l, %l)\n%r = add(%s, %x)", "", "added to itself"),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, more, reason = DECLINES[name]
    before = graph_of(text(lines, more))
    after, log = applied(FuseLinearResidual(), before)
    assert str(after) == str(before)
    assert reason in "\n".join(log.declined)


def test_a_gated_product_is_no_candidate() -> None:
    lines = "%g = linear(%y, @w6, gate='silu')\n%r = add(%g, %y)"
    before = text(lines).replace("@w: f32[8, 8]", "@w6: f32[12, 6]")
    after, _ = applied(FuseLinearResidual(), graph_of(before))
    assert forms(after) == {"linear gate": 1, "add": 1}
