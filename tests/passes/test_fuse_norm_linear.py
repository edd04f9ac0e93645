"""fuse-norm-linear: norms and residual sums move into the product that reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.passes.fusion.fuse_norm_linear import FuseNormLinear
from pass_checks import applied, assert_equal_results, body, checked, forms, graph_of

GRAPH = """
    graph @block(%x: f32[T, 8], %d: f32[T, 8], %row: f32[8]) T=1..8 {{
      {lines}
      return %r{more}
    }} where {{
      @n: f32[8]
      @post: f32[8]
      @w: f32[6, 8]
      @sq: f32[8, 8]
      @b: f32[6]
      @both: f32[12, 8]
      @bias: f32[12]
    }}"""

NORM = "%h = rms_norm({}, weight=@n, eps=0.01)\n"
ADD = "%s = add(%x, %d)\n"
SANDWICH = "%q = rms_norm(%d, weight=@post, eps=0.1)\n%s = add(%x, %q)\n"
# Every product that has a prologue, over %h, with and without operands of its own.
PRODUCTS = {
    "linear": "%r = linear(%h, @w)",
    "linear with a bias": "%r = linear(%h, @w, bias=@b)",
    "bias and residual": "%r = linear(%h, @w, bias=@b, residual=%res)",
    "gate": "%r = linear(%h, @both, gate='silu')",
    "gate with a bias": "%r = linear(%h, @both, bias=@bias, gate='gelu')",
}
PROLOGUES = {
    "norm": (NORM.format("%x"), ("norm",)),
    "sum": (ADD.replace("%s", "%h"), ("delta",)),
    "sum and norm": (ADD + NORM.format("%s"), ("norm", "delta")),
    "sandwich": (SANDWICH.replace("%s", "%h"), ("delta", "post_norm")),
    "sandwich and norm": (SANDWICH + NORM.format("%s"), ("norm", "delta", "post_norm")),
    "sandwich, norm first": (
        SANDWICH.replace("%x, %q", "%q, %x") + NORM.format("%s"),
        ("norm", "delta", "post_norm"),
    ),
}


def text(lines: str, more: str = "") -> str:
    return GRAPH.format(lines=lines, more=more)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_prologue_of_every_product(prologue: str, product: str) -> None:
    lines, expected = PROLOGUES[prologue]
    residual = "%res = slice(%d, dim=1, start=0, stop=6)\n" if "%res" in PRODUCTS[product] else ""
    after = checked(FuseNormLinear(), text(residual + lines + PRODUCTS[product]))
    own = [name for name in ("bias", "residual", "gate") if name in product]
    found = " ".join(("linear", *expected, *own))
    assert forms(after) == {found: 1, **({"slice": 1} if residual else {})}


def test_a_sum_that_others_use_is_returned(golden: Callable[[str], None]) -> None:
    """The residual chain: the product that computes s gives it to the next sum."""
    lines = f"""{SANDWICH}{NORM.format("%s")}
        %m = linear(%h, @both, gate='silu')
        %o = linear(%m, @down)
        %z = tanh(%s)
        %r = linear(%o, @sq, residual=%s)"""
    before = text(lines, ", %z, %s").replace("@sq:", "@down: f32[8, 6]\n@sq:")
    after = checked(FuseNormLinear(), before)
    assert forms(after) == {
        "linear norm delta post_norm gate": 1,
        "linear": 1,
        "tanh": 1,
        "linear residual": 1,
    }
    golden(str(after))


def test_a_chain_of_layers() -> None:
    """Each product takes the sum before it, and gives it to the next."""
    layer = """%q{i} = rms_norm(%d{i}, weight=@post, eps=0.1)
        %s{j} = add(%s{i}, %q{i})
        %h{j} = rms_norm(%s{j}, weight=@n, eps=0.01)
        %d{j} = linear(%h{j}, @sq)
        """
    lines = "".join(layer.format(i=i, j=i + 1) for i in range(4))
    lines = lines.replace("%d0", "%d").replace("%s0", "%x") + "%r = add(%s4, %d4)"
    after = checked(FuseNormLinear(), text(lines))
    assert forms(after) == {"linear norm delta post_norm": 4, "add": 1}


def test_several_products_of_a_sum() -> None:
    """One computes it and returns it; the others read that."""
    lines = f"{ADD}%a = linear(%s, @w)\n%c = linear(%s, @w, bias=@b)\n%r = add(%a, %c)"
    after = checked(FuseNormLinear(), text(lines))
    assert forms(after) == {"linear delta bias": 1, "linear": 1, "add": 1}


def test_two_norms_of_a_sum() -> None:
    lines = f"""{ADD}{NORM.format("%s")}
        %k = rms_norm(%s, weight=@post, eps=0.1)
        %a = linear(%h, @w)
        %c = linear(%k, @w, bias=@b)
        %r = add(%a, %c)"""
    after = checked(FuseNormLinear(), text(lines))
    assert forms(after) == {"linear norm": 1, "linear norm delta bias": 1, "add": 1}


def test_a_product_that_adds_the_sum_that_it_reads() -> None:
    """It cannot take as an operand what it computes: the norm goes in, the sum stays."""
    residual = "%r = linear(%h, @sq, residual=%s)"
    before = graph_of(text(ADD + NORM.format("%s") + residual))
    after, log = applied(FuseNormLinear(), before)
    assert_equal_results(before, after)
    assert body(after)[1] == "%1 = linear(%0, @sq, norm=@n, residual=%0, eps=0.01)"
    assert "an input of the match depends on one of its results" in "\n".join(log.declined)


def test_a_sum_stays_where_an_operand_waits_for_it() -> None:
    residual = "%t = tanh(%s)\n%r = linear(%h, @sq, residual=%t)"
    before = graph_of(text(ADD + NORM.format("%s") + residual))
    after, log = applied(FuseNormLinear(), before)
    assert_equal_results(before, after)
    assert forms(after) == {"add": 1, "tanh": 1, "linear norm residual": 1}
    assert "an input of the match depends on one of its results" in "\n".join(log.declined)


def test_a_post_norm_that_others_use_stays() -> None:
    after = checked(FuseNormLinear(), text(SANDWICH + "%r = linear(%s, @w)", ", %q"))
    assert forms(after) == {"rms_norm weight": 1, "linear delta": 1}


def test_a_sum_of_a_normed_value_with_itself() -> None:
    lines = "%q = rms_norm(%d, weight=@post, eps=0.1)\n%s = add(%q, %q)\n%r = linear(%s, @w)"
    after = checked(FuseNormLinear(), text(lines))
    assert forms(after) == {"rms_norm weight": 1, "linear delta": 1}


OUTSIDE = "rms_norm inside the match is used outside"
DECLINES = {
    "a norm of several products": (
        NORM.format("%x") + "%a = linear(%h, @w)\n%c = linear(%h, @w, bias=@b)\n%r = add(%a, %c)",
        "",
        OUTSIDE,
    ),
    "a norm that is returned": (NORM.format("%x") + "%r = linear(%h, @w)", ", %h", OUTSIDE),
    "a norm that is also the residual": (
        NORM.format("%x") + "%r = linear(%h, @sq, residual=%h)",
        "",
        "the product has the rms_norm as another operand too",
    ),
    "a norm without a weight": (
        "%h = rms_norm(%x, eps=0.01)\n%r = linear(%h, @w)",
        "",
        "the norm has no weight",
    ),
    "a layer_norm": (
        "%h = layer_norm(%x, weight=@n, bias=@post, eps=0.01)\n%r = linear(%h, @w)",
        "",
        "a layer_norm is no prologue",
    ),
    "a row": (
        "%s = add(%x, %row)\n%r = linear(%s, @w)",
        "",
        "f32[T, 8] and f32[8] are broadcast in their sum",
    ),
    "a number": ("%s = add(%x, f32(1.5))\n%r = linear(%s, @w)", "", "are broadcast in their sum"),
    "a cast between": (
        NORM.format("%x") + "%c = cast(%h, dtype='bf16')\n"
        "%wb = cast(@w, dtype='bf16')\n%r = linear(%c, %wb)",
        "",
        "a cast stands between the norm and the product",
    ),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, more, reason = DECLINES[name]
    before = graph_of(text(lines, more))
    after, log = applied(FuseNormLinear(), before)
    assert str(after) == str(before)
    assert reason in "\n".join(log.declined)


def test_a_prologue_that_is_there_stays() -> None:
    lines = NORM.format("%x") + "%r = linear(%h, @w, norm=@n, eps=0.01)"
    after, _ = applied(FuseNormLinear(), graph_of(text(lines)))
    assert forms(after) == {"rms_norm weight": 1, "linear norm": 1}
