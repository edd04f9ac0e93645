"""raise-ops on gated units, and on whole blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.pipeline import PassError, run_pipeline
from ingot.passes.pipelines import RAISING
from ingot.passes.raising.raise_ops import RaiseOps
from pass_checks import applied, assert_equal_results, checked, graph_of, ops

UNIT = """
    graph @unit(%x: {dtype}[T, 8], %z: {dtype}[T, 8]) T=1..8 {{
      %g = linear(%x, @gate)
      %u = linear(%x, @up)
      {act}
      %y = mul(%a, %u)
      return %y
    }} where {{
      @gate: {dtype}[6, 8]
      @up: {dtype}[6, 8]
    }}"""
ACTIVATIONS = {
    "silu": "%a = silu(%g)",
    "gelu": "%a = gelu(%g, approximate='none')",
    "gelu_tanh": "%a = gelu(%g, approximate='tanh')",
    "relu": "%a = relu(%g)",
    "sigmoid": "%a = sigmoid(%g)",
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_gated_units(activation: str, dtype: str) -> None:
    text = UNIT.format(dtype=dtype, act=ACTIVATIONS[activation])
    after = checked(RaiseOps(), text, 1e-5 if dtype == "f32" else 2e-2)
    assert ops(after) == {"linear": 2, "glu": 1}
    (glu,) = (n for n in after.nodes() if n.op.name == "glu")
    assert glu.attrs == {"activation": activation}
    gate, up = (a.node.args[1].attrs["name"] for a in glu.args)
    assert (gate, up) == ("gate", "up")


def test_up_before_gate() -> None:
    text = UNIT.format(dtype="f32", act=ACTIVATIONS["silu"]).replace("mul(%a, %u)", "mul(%u, %a)")
    assert ops(checked(RaiseOps(), text))["glu"] == 1


def test_silu_spelled_out(golden: Callable[[str], None]) -> None:
    text = UNIT.format(dtype="f32", act="%i = sigmoid(%g)\n%a = mul(%i, %g)")
    golden(str(checked(RaiseOps(), text)))


def test_sigmoid_of_one_times_another_is_no_silu() -> None:
    text = UNIT.format(dtype="f32", act="%i = sigmoid(%g)\n%a = mul(%i, %u)")
    after = checked(RaiseOps(), text)
    assert "silu" not in str(after)


def test_declines_a_gate_that_is_broadcast() -> None:
    """A shared expert's gate is one number a token."""
    text = UNIT.format(dtype="f32", act=ACTIVATIONS["sigmoid"]).replace(
        "@gate: f32[6", "@gate: f32[1"
    )
    before = graph_of(text)
    after, log = applied(RaiseOps(), before)
    assert ops(after)["glu"] == 0
    assert "f32[T, 1] gates f32[T, 6]" in "\n".join(log.declined)
    assert_equal_results(before, after)


def test_declines_an_activation_that_others_use() -> None:
    text = UNIT.format(dtype="f32", act=ACTIVATIONS["silu"]).replace("return %y", "return %y, %a")
    before = graph_of(text)
    after, log = applied(RaiseOps(), before)
    assert ops(after) == ops(before)
    assert "silu inside the match is used outside" in "\n".join(log.declined)


BLOCK = """
    graph @block(%x: {dtype}[T, 8], %positions: i32[T]) T=1..8 {{
      %h = cast(%x, dtype='f32')
      %s = mul(%h, %h)
      %m = mean(%s, dim=1, keepdim=True)
      %v = add(%m, f32(1e-06))
      %r = rsqrt(%v)
      %u = mul(%h, %r)
      %uc = cast(%u, dtype='{dtype}')
      %n = mul(@norm, %uc)
      %q = linear(%n, @w)
      %q4 = view(%q, shape=[1, T, 2, 4])
      %qt = permute(%q4, dims=[0, 2, 1, 3])
      %p = cast(%positions, dtype='f32')
      %pc = view(%p, shape=[1, T, 1])
      %a = mul(%pc, @inv)
      %e = cat(%a, %a, dim=2)
      %cf = cos(%e)
      %sf = sin(%e)
      %cb = cast(%cf, dtype='{dtype}')
      %sb = cast(%sf, dtype='{dtype}')
      %c = view(%cb, shape=[1, 1, T, 4])
      %d = view(%sb, shape=[1, 1, T, 4])
      %lo = slice(%qt, dim=3, start=0, stop=2)
      %hi = slice(%qt, dim=3, start=2, stop=4)
      %ng = neg(%hi)
      %ro = cat(%ng, %lo, dim=3)
      %k = mul(%qt, %c)
      %l = mul(%ro, %d)
      %t = add(%k, %l)
      %tt = permute(%t, dims=[0, 2, 1, 3])
      %o = view(%tt, shape=[T, 8])
      %g = linear(%o, @gate)
      %act = silu(%g)
      %up = linear(%o, @up)
      %glu = mul(%act, %up)
      %y = linear(%glu, @down)
      %res = add(%x, %y)
      return %res
    }} where {{
      @norm: {dtype}[8]
      @w: {dtype}[8, 8]
      @inv: f32[2]
      @gate: {dtype}[6, 8]
      @up: {dtype}[6, 8]
      @down: {dtype}[8, 6]
    }}"""


def test_block(golden: Callable[[str], None]) -> None:
    """A block as bf16 models are traced, batch and all."""
    before = graph_of(BLOCK.format(dtype="bf16"))
    after = run_pipeline(before, RAISING)[-1].graph
    assert_equal_results(before, after, 6e-2)
    golden(str(after))


def test_block_in_f32() -> None:
    before = graph_of(BLOCK.format(dtype="f32"))
    after = run_pipeline(before, RAISING)[-1].graph
    assert_equal_results(before, after, 1e-5)
    assert ops(after)["rope"] == ops(after)["rms_norm"] == ops(after)["glu"] == 1


def test_required_and_nothing_to_raise() -> None:
    graph = graph_of("graph @none(%x: f32[T, 8]) T=1..8 {\n%0 = exp(%x)\nreturn %0\n}")
    with pytest.raises(PassError, match=r"raise-ops was required but matched nothing"):
        run_pipeline(graph, RAISING, require_match=("raise-ops",))


def test_required_names_the_nearest_misses() -> None:
    text = UNIT.format(dtype="f32", act=ACTIVATIONS["silu"]).replace("return %y", "return %y, %a")
    with pytest.raises(PassError, match="silu inside the match is used outside"):
        run_pipeline(graph_of(text), RAISING, require_match=("raise-ops",))
