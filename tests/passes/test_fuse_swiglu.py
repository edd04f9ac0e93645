"""fuse-swiglu: two products, or two halves of one, and their activation become one op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.ops.glu import ACTIVATIONS, CLAMPED
from ingot.passes.fusion.fuse_swiglu import FuseSwiglu
from pass_checks import applied, assert_equal_results, body, checked, forms, graph_of, ops

MLP = """
    graph @mlp(%x: f32[T, 8], %z: f32[T, 8], %v: f32[6, 8]) T=1..8 {{
      {lines}
      return %r{more}
    }} where {{
      @wg: f32[6, 8]
      @wu: f32[6, 8]
      @both: f32[12, 8]
      @bg: f32[6]
      @bu: f32[6]
      @bias: f32[12]
    }}"""
SILU = "%r = glu(%g, %u, activation='silu')"
TWO = "%g = linear(%x, @wg)\n%u = linear(%x, @wu)\n"
HALVES = """%l = linear(%x, @both)
    %g = slice(%l, dim=1, start=0, stop=6)
    %u = slice(%l, dim=1, start=6, stop=12)
    """


def text(lines: str, more: str = "") -> str:
    return MLP.format(lines=lines, more=more)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, CLAMPED])
@pytest.mark.parametrize("lines", [TWO, HALVES], ids=["two products", "one product"])
def test_every_activation(lines: str, activation: str) -> None:
    more = ", alpha=1.702, limit=0.5" if activation == CLAMPED else ""
    after = checked(FuseSwiglu(), text(f"{lines}%r = glu(%g, %u, activation='{activation}'{more})"))
    assert ops(after)["linear"] == 1
    assert not ops(after).keys() & {"glu", "slice"}
    (node,) = (n for n in after.nodes() if n.op.name == "linear")
    assert node.attrs["gate"] == activation
    assert node.attrs.get("limit", 0.0) == (0.5 if more else 0.0)


BIASES = {
    "both": "%g = linear(%x, @wg, bias=@bg)\n%u = linear(%x, @wu, bias=@bu)\n",
    "gate": "%g = linear(%x, @wg, bias=@bg)\n%u = linear(%x, @wu)\n",
    "up": "%g = linear(%x, @wg)\n%u = linear(%x, @wu, bias=@bu)\n",
    "one product": HALVES.replace("@both)", "@both, bias=@bias)"),
}


@pytest.mark.parametrize("which", BIASES)
def test_biases(which: str) -> None:
    after = checked(FuseSwiglu(), text(BIASES[which] + SILU))
    assert forms(after)["linear bias gate"] == 1


def test_two_products(golden: Callable[[str], None]) -> None:
    golden(str(checked(FuseSwiglu(), text(BIASES["gate"] + SILU))))


def test_halves_of_one_product_keep_their_weight() -> None:
    after = checked(FuseSwiglu(), text(HALVES + SILU))
    assert body(after)[0] == "%0 = linear(%x, @both, gate='silu')"


CUTS = {
    "up before gate": ("start=6, stop=12", "start=0, stop=6"),
    "interleaved": ("start=0, stop=12, step=2", "start=1, stop=12, step=2"),
    "interleaved, up first": ("start=1, stop=12, step=2", "start=0, stop=12, step=2"),
    "rows that nothing uses": ("start=0, stop=4", "start=5, stop=9"),
    "rows between": ("start=2, stop=5", "start=5, stop=8"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_other_rows_of_one_product_are_chosen_in_the_weight(cut: str) -> None:
    gate, up = CUTS[cut]
    lines = f"%l = linear(%x, @both, bias=@bias)\n%g = slice(%l, dim=1, {gate})\n"
    after = checked(FuseSwiglu(), text(f"{lines}%u = slice(%l, dim=1, {up})\n{SILU}"))
    assert forms(after)["linear bias gate"] == ops(after)["linear"] == 1
    assert "slice" in ops(after)


PACKED = """
    graph @mlp(%x: f32[T, 32]) T=1..8 {{
      %w = mxfp4(@c, @s, dtype='f32')
      {lines}
      %r = glu(%g, %u, activation='silu')
      return %r
    }} where {{
      @c: u8[6, 16]
      @s: u8[6, 1]
    }}"""


def test_packed_weights_are_joined_packed() -> None:
    lines = "%v = mxfp4(@s2, @t2, dtype='f32')\n%g = linear(%x, %w)\n%u = linear(%x, %v)"
    packed = PACKED.format(lines=lines)
    packed = packed.replace("@s: u8[6, 1]", "@s: u8[6, 1]\n@s2: u8[6, 16]\n@t2: u8[6, 1]")
    assert forms(checked(FuseSwiglu(), packed)) == {"cat": 2, "mxfp4": 1, "linear gate": 1}


def test_packed_weights_are_cut_packed() -> None:
    halves = HALVES.replace("@both", "%w").replace("start=0, stop=6", "start=0, stop=6, step=2")
    lines = halves.replace("start=6, stop=12", "start=1, stop=6, step=2")
    after = checked(FuseSwiglu(), PACKED.format(lines=lines))
    assert forms(after) == {"slice": 4, "cat": 2, "mxfp4": 1, "linear gate": 1}


ONE_HALF = "%l = linear(%x, @both)\n%g = slice(%l, dim=1, start=0, stop=6)\n"
ROWS = """%l = linear(%v, @both)
    %g = slice(%l, dim=0, start=0, stop=3)
    %u = slice(%l, dim=0, start=3, stop=6)
    """
ITSELF = "%r = glu(%g, %g, activation='silu')"
OUTSIDE = "inside the match is used outside"
DECLINES = {
    "the gate has another user": (TWO + SILU, ", %g", f"linear {OUTSIDE}"),
    "the product has another user": (HALVES + SILU, ", %l", f"linear {OUTSIDE}"),
    "a half has another user": (HALVES + SILU, ", %u", f"slice {OUTSIDE}"),
    "two values": (TWO.replace("%x, @wu", "%z, @wu") + SILU, "", "products of two values"),
    "no weight": (
        TWO.replace("@wu", "%v") + SILU,
        "",
        "a weight of the product depends on the input",
    ),
    "one product": ("%g = linear(%x, @wg)\n" + ITSELF, "", "gate and up are one value"),
    "one half": (ONE_HALF + ITSELF, "", "gate and up are one value"),
    "rows": (ROWS + SILU, "", "a slice of the product touches the tokens"),
}


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name: str) -> None:
    lines, more, reason = DECLINES[name]
    before = graph_of(text(lines, more))
    after, log = applied(FuseSwiglu(), before)
    assert str(after) == str(before)
    assert reason in "\n".join(log.declined)


def test_one_of_two_units_over_one_value() -> None:
    """Two gated units that read the same x are two ops, each with its weights."""
    lines = f"""{TWO}%a = glu(%g, %u, activation='silu')
        {HALVES.replace("%g", "%g2").replace("%u", "%u2")}
        %b = glu(%g2, %u2, activation='relu')
        %r = add(%a, %b)"""
    after = checked(FuseSwiglu(), text(lines))
    assert forms(after)["linear gate"] == 2
    assert_equal_results(graph_of(text(lines)), after)
