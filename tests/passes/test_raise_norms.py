"""raise-ops on normalisations, in the forms in which models write them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
from ingot.compiler.ir import Graph
from ingot.compiler.pipeline import run_pipeline
from ingot.passes.pipelines import RAISING
from ingot.passes.raising.raise_ops import RaiseOps
from pass_checks import applied, assert_equal_results, checked, graph_of, ops

ROOTS = {
    "rsqrt": ("%r = rsqrt(%v)", "%u = mul(%h, %rv)"),
    "sqrt": ("%r = sqrt(%v)", "%u = div(%h, %rv)"),
    "pow": ("%r = pow(%v, f32(-0.5))", "%u = mul(%rv, %h)"),
}
# How the weight meets the unit value %u; `c` is the cast back to x's dtype.
WEIGHTS = {
    "none": ("%y = {c}",),
    "after the cast": ("%c = {c}", "%y = mul(@w, %c)"),
    "before the cast": ("%wide = cast(@w, dtype='f32')", "%p = mul(%wide, %u)", "%y = {p}"),
    "one more": (
        "%wide = cast(@w, dtype='f32')",
        "%one = add(%wide, f32(1.0))",
        "%p = mul(%u, %one)",
        "%y = {p}",
    ),
}


def norm_text(
    root: str = "rsqrt", weight: str = "before the cast", dtype: str = "bf16", shape: str = "T, 8"
) -> str:
    """x · rsqrt(mean(x²) + eps) · w over the last dim of x `dtype`[shape]."""
    *rows, size = shape.split(", ")
    column = ", ".join((*rows, "1"))
    inverse, unit = ROOTS[root]
    lines = [
        f"graph @norm(%x: {dtype}[{shape}]) T=1..8 {{",
        "%h = cast(%x, dtype='f32')" if dtype != "f32" else "%h = add(%x, %x)",
        "%s = mul(%h, %h)",
        f"%m = mean(%s, dim={len(rows)}, keepdim=False)",
        "%v = add(%m, f32(1e-06))",
        inverse,
        f"%rv = view(%r, shape=[{column}])",
        unit,
        *WEIGHTS[weight],
        "return %y",
        "} where {",
        f"@w: {dtype}[{size}]",
        "}",
    ]
    text = "\n".join(lines)
    if dtype == "f32":
        text = text.replace("%wide = cast(@w, dtype='f32')", "%wide = mul(@w, f32(0.5))")
        text = text.replace("%y = {p}", "%y = view(%p, shape=[SHAPE])")
        text = text.replace("%c = {c}", "%c = mul(%u, f32(1.0))")
        return text.replace("%y = {c}", "%y = view(%u, shape=[SHAPE])").replace("SHAPE", shape)
    text = text.replace("{c}", f"cast(%u, dtype='{dtype}')")
    return text.replace("{p}", f"cast(%p, dtype='{dtype}')")


@pytest.mark.parametrize(("root", "weight"), list(product(ROOTS, WEIGHTS)))
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_every_form_becomes_one_op(root: str, weight: str, dtype: str) -> None:
    before = graph_of(norm_text(root, weight, dtype))
    after = run_pipeline(before, RAISING)[-1].graph
    assert ops(after)["rms_norm"] == 1
    assert not ops(after).keys() & {"mean", "rsqrt", "sqrt", "pow", "view"}
    assert_equal_results(before, after, {"bf16": 2e-2, "f16": 3e-3, "f32": 1e-5}[dtype])
    (norm,) = (n for n in after.nodes() if n.op.name == "rms_norm")
    assert norm.types[0].dtype == dtype
    assert norm.attrs["eps"] == 1e-6
    assert len(norm.args) == (1 if weight == "none" else 2)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_weight_that_was_widened_is_taken_as_it_is_held(dtype: str) -> None:
    after = checked(RaiseOps(), norm_text("rsqrt", "before the cast", dtype), 2e-2)
    (norm,) = (n for n in after.nodes() if n.op.name == "rms_norm")
    assert norm.args[1].type.dtype == dtype
    assert ops(after) == {"rms_norm": 1}


def test_a_weight_that_was_rounded_stays_so() -> None:
    """In bf16 1.01 is 1.0078125."""
    text = norm_text("rsqrt", "before the cast", "bf16").replace("@w: bf16[8]", "@w: f32[8]")
    narrow = "%n = cast(@w, dtype='bf16')\n%wide = cast(%n, dtype='f32')"
    after = checked(RaiseOps(), text.replace("%wide = cast(@w, dtype='f32')", narrow), 2e-2)
    (norm,) = (n for n in after.nodes() if n.op.name == "rms_norm")
    assert norm.args[1].type.dtype == "bf16"
    assert ops(after) == {"cast": 1, "rms_norm": 1}


def test_one_more_than_the_weight(golden: Callable[[str], None]) -> None:
    golden(str(checked(RaiseOps(), norm_text(weight="one more"), 2e-2)))


def test_norm_of_each_head(golden: Callable[[str], None]) -> None:
    golden(str(checked(RaiseOps(), norm_text("rsqrt", "after the cast", "bf16", "T, 2, 8"), 2e-2)))


def test_heads_that_were_moved_first() -> None:
    """Head-major models permute, norm over each head, and attention permutes back."""
    before = graph_of("""
        graph @heads(%x: f32[T, 16]) T=1..8 {
          %0 = view(%x, shape=[T, 2, 8])
          %1 = permute(%0, dims=[1, 0, 2])
          %2 = mul(%1, %1)
          %3 = mean(%2, dim=2, keepdim=True)
          %4 = add(%3, f32(1e-05))
          %5 = rsqrt(%4)
          %6 = mul(%1, %5)
          %7 = mul(@w, %6)
          %8 = permute(%7, dims=[1, 0, 2])
          return %8
        } where {
          @w: f32[8]
        }""")
    after = run_pipeline(before, RAISING)[-1].graph
    assert ops(after) == {"view": 1, "rms_norm": 1}
    assert_equal_results(before, after)


LAYER = """
    graph @layer(%x: {dtype}[T, 8]) T=1..8 {{
      %h = {wide}
      %m = mean(%h, dim=1, keepdim=False)
      %c = view(%m, shape=[T, 1])
      %d = sub(%h, %c)
      %s = mul(%d, %d)
      %v = mean(%s, dim=1, keepdim=False)
      %e = add(%v, f32(1e-05))
      %r = rsqrt(%e)
      %rv = view(%r, shape=[T, 1])
      %u = mul(%d, %rv)
      {weighted}
      return %y
    }} where {{
      @w: f32[8]
    }}"""


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_layer_norm(dtype: str, scaled: bool) -> None:
    wide = "cast(%x, dtype='f32')" if dtype != "f32" else "mul(%x, f32(2.0))"
    last = "%p" if scaled else "%u"
    weighted = ("%p = mul(@w, %u)\n" if scaled else "") + (
        f"%y = cast({last}, dtype='{dtype}')" if dtype != "f32" else f"%y = add({last}, f32(0.5))"
    )
    text = LAYER.format(dtype=dtype, wide=wide, weighted=weighted)
    after = checked(RaiseOps(), text, 2e-2 if dtype == "bf16" else 1e-5)
    assert ops(after) == {"layer_norm": 1, **({} if dtype == "bf16" else {"mul": 1, "add": 1})}


def declined(text: str) -> tuple[Graph, str]:
    before = graph_of(text)
    after, log = applied(RaiseOps(), before)
    assert_equal_results(before, after, 2e-2)
    assert ops(after) == ops(before)
    return after, "\n".join(log.declined)


def test_declines_a_mean_over_another_dim() -> None:
    text = norm_text("rsqrt", "none", "bf16", "T, 8, 8").replace("dim=2", "dim=1")
    assert "the mean is not over the last dim" in declined(text)[1]


def test_a_weight_over_another_dim_is_left_outside() -> None:
    text = norm_text("rsqrt", "before the cast", "bf16", "T, 2, 8").replace(
        "@w: bf16[8]", "@w: bf16[2, 1]"
    )
    before = graph_of(text)
    after, _ = applied(RaiseOps(), before)
    assert_equal_results(before, after, 2e-2)
    (norm,) = (n for n in after.nodes() if n.op.name == "rms_norm")
    assert len(norm.args) == 1
    assert ops(after)["mul"] == 1


def test_declines_what_others_use() -> None:
    text = norm_text(dtype="bf16").replace("return %y", "return %y, %r")
    assert "rsqrt inside the match is used outside" in declined(text)[1]


def test_declines_another_power() -> None:
    text = norm_text("pow", "none").replace("f32(-0.5)", "f32(-0.25)")
    declined(text)


def test_declines_a_mean_of_another_product() -> None:
    """x · h is not x²."""
    text = norm_text("rsqrt", "none").replace("%s = mul(%h, %h)", "%n = neg(%h)\n%s = mul(%h, %n)")
    text = text.replace("f32(1e-06)", "f32(50.0)")  # keeps the root real
    declined(text)


def test_declines_a_layer_norm_centred_otherwise() -> None:
    text = LAYER.format(dtype="f32", wide="neg(%x)", weighted="%y = mul(@w, %u)").replace(
        "%m = mean(%h", "%m = mean(%x"
    )
    before = graph_of(text)
    after, _ = applied(RaiseOps(), before)
    assert ops(after)["layer_norm"] == 0
    assert_equal_results(before, after)
