"""Dropping unit dims: every rule on values with a batch of one, wherever the unit dims stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ingot.compiler.axes import Dims
from ingot.compiler.ir import Graph, Op
from ingot.compiler.ops.leaf import param
from ingot.compiler.rewrite import Log
from ingot.compiler.types import TensorType
from ingot.compiler.validate import check_rewrite
from ingot.compiler.verify import verify
from ingot.passes.raising.canonicalize import simplified
from ingot.passes.raising.unit_dims import unit_dims_dropped
from op_cases import Case, sampled_ops
from pass_checks import assert_equal_results, graph_of, ops

HEAD = """
graph @u(%x: f32[1, T, 4, 6], %y: f32[T, 1, 4, 1], %z: f32[1, T, 1, 6], %i: i64[1, T]) T=1..8 {
"""
WHERE = "\n} where {\n@w: f32[6]\n@v: f32[5, 6]\n@table: f32[8, 6]\n@col: f32[1, 6]\n}"

NODES = {
    "pointwise": "%r = add(%x, %z)",
    "pointwise over the left": "%r = mul(%z, @w)",
    "a unit dim inside a broadcast": "%r = mul(%x, %y)",
    "unit weights": "%r = mul(%x, @col)",
    "literal": "%r = mul(%x, f32(2.0))",
    "where": "%m = lt(%x, %z)\n%r = where(%m, %x, %z)",
    "view": "%r = view(%x, shape=[T, 1, 24])",
    "view into unit dims": "%r = view(%z, shape=[T, 2, 1, 3, 1])",
    "permute": "%r = permute(%x, dims=[2, 0, 3, 1])",
    "permute of unit dims alone": "%r = permute(%z, dims=[2, 1, 0, 3])",
    "expand of a unit dim": "%r = expand(%z, shape=[1, T, 4, 6])",
    "expand with new dims": "%r = expand(@w, shape=[1, T, 6])",
    "slice": "%r = slice(%x, dim=3, start=1, stop=6, step=2)",
    "slice to one": "%r = slice(%x, dim=2, start=1, stop=2)",
    "slice of a unit dim": "%r = slice(%x, dim=0, start=0, stop=1)",
    "slice of nothing": "%s = slice(%x, dim=0, start=0, stop=0)\n%r = cat(%s, %x, dim=0)",
    "slice_scatter": (
        "%s = slice(%x, dim=3, start=1, stop=2)\n%r = slice_scatter(%x, %s, dim=3, start=4, stop=5)"
    ),
    "slice_scatter along a unit dim": (
        "%s = slice(%x, dim=0, start=0, stop=1)\n%r = slice_scatter(%x, %s, dim=0, start=0, stop=1)"
    ),
    "cat of unit dims": "%r = cat(%z, %z, dim=2)",
    "cat along others": "%r = cat(%x, %z, dim=2)",
    "cat along the last dim from the end": "%r = cat(%x, %x, dim=-1)",
    "gather": "%g = topk(%x, k=2, dim=3)\n%r = gather(%x, %h, dim=3)".replace("%g", "%g, %h"),
    "gather of one": "%g, %h = topk(%x, k=1, dim=3)\n%r = gather(%x, %h, dim=3)",
    "gather from a unit dim": "%g, %h = topk(%z, k=1, dim=2)\n%r = gather(%z, %h, dim=2)",
    "mean": "%r = mean(%x, dim=3, keepdim=True)",
    "sum without its dim": "%r = sum(%x, dim=-2, keepdim=False)",
    "amax of a unit dim": "%r = amax(%z, dim=2, keepdim=False)",
    "mean of a kept unit dim": "%r = mean(%z, dim=-2, keepdim=True)",
    "softmax": "%r = softmax(%x, dim=-1)",
    "softmax over a unit dim": "%r = softmax(%z, dim=2)",
    "topk": "%r, %k = topk(%x, k=1, dim=2)",
    "topk over a unit dim": "%r, %k = topk(%z, k=1, dim=2)",
    "linear": "%r = linear(%x, @v)",
    "linear to one": "%r = linear(%x, @col)",
    "linear from one": (
        "%a = view(%x, shape=[1, T, 24, 1])\n%b = view(@w, shape=[6, 1])\n%r = linear(%a, %b)"
    ),
    "embedding": "%r = embedding(%i, @table)",
    "matmul": "%a = permute(@v, dims=[1, 0])\n%r = matmul(%z, %a)",
    "matmul of batches": "%a = permute(%x, dims=[0, 1, 3, 2])\n%r = matmul(%x, %a)",
    "outer product": (
        "%a = view(%i, shape=[1, T, 1])\n%c = cast(%a, dtype='f32')\n%r = matmul(%c, @col)"
    ),
    "rms_norm": "%r = rms_norm(%z, weight=@w, eps=1e-05)",
    "rms_norm of one": "%a = view(%x, shape=[T, 24, 1])\n%r = rms_norm(%a, eps=0.5)",
    "layer_norm": "%r = layer_norm(%z, weight=@w, eps=1e-05)",
    "attention keeps its shapes": (
        "%a = view(%x, shape=[T, 4, 6])\n%c = view(%z, shape=[T, 1, 6])\n"
        "%r = attention(%a, %c, %c, scale=0.5)"
    ),
    "complex": (
        "%a = view(%z, shape=[1, T, 1, 3, 2])\n%c = aten.view_as_complex.default(%a)\n"
        "%r = aten.view_as_real.default(%c)"
    ),
    "complex of one": (
        "%a = view(%x, shape=[1, T, 12, 1, 2])\n%c = aten.view_as_complex.default(%a)\n"
        "%m = mul(%c, %c)\n%r = aten.view_as_real.default(%m)"
    ),
    "an element-wise op of torch": "%r = aten.softplus.default(%x)",
    "an element-wise op of torch over rows": "%r = aten.hypot.default(%x, %z)",
    "an unknown op keeps its shapes": "%r = aten.cumsum.default(%x, dim=2)",
}


def without_unit_dims(before: Graph) -> Graph:
    """`before` without unit dims, each rewrite checked by itself."""
    log, rewrites = Log(), tuple(unit_dims_dropped(before))
    for one in rewrites:
        check_rewrite(before, one)
    after = simplified(log.apply(before, rewrites), log)
    verify(after)
    return after


def dropped(text: str) -> tuple[Graph, Graph]:
    before = graph_of(HEAD + text + "\nreturn %r" + WHERE)
    return before, without_unit_dims(before)


@pytest.mark.parametrize("name", NODES)
def test_the_meaning_stays(name: str) -> None:
    before, after = dropped(NODES[name])
    assert [o.type for o in after.outputs] == [o.type for o in before.outputs]
    assert_equal_results(before, after)


# Ops that keep their unit dims, between views: they are about one of them.
KEPT = {
    *("slice of a unit dim", "slice of nothing", "slice_scatter along a unit dim"),
    *("slice_scatter", "gather of one", "gather from a unit dim", "softmax over a unit dim"),
    *("topk over a unit dim", "topk", "cat of unit dims", "cat along others", "slice to one"),
    *("linear to one", "linear from one", "rms_norm of one", "complex of one"),
    *("attention keeps its shapes", "an unknown op keeps its shapes", "unit weights"),
    *("a unit dim inside a broadcast", "mean", "matmul", "sum without its dim"),
    "matmul of batches",
}


@pytest.mark.parametrize("name", [n for n in NODES if n not in KEPT])
def test_no_unit_dims_are_left(name: str) -> None:
    _, after = dropped(NODES[name])
    border = {r.node for r in after.outputs}
    for node in after.nodes():
        # Views may have them: they make operands that broadcast.
        if node.op.name not in ("param", "constant", "literal", "view") and node not in border:
            assert all(1 not in t.shape for t in node.types), node


def test_an_outer_product_is_element_wise() -> None:
    assert ops(dropped(NODES["outer product"])[1])["matmul"] == 0


def test_a_sum_of_one_is_no_sum() -> None:
    for name in ("amax of a unit dim", "mean of a kept unit dim"):
        assert set(ops(dropped(NODES[name])[1])) <= {"view"}


def test_a_traced_router(golden: Callable[[str], None]) -> None:
    before = graph_of("""
        graph @router(%x: f32[1, T, 6]) T=1..8 {
          %0 = view(%x, shape=[T, 6])
          %1 = linear(%0, @v)
          %2 = softmax(%1, dim=-1)
          %3, %4 = topk(%2, k=2, dim=-1)
          %5 = sum(%3, dim=-1, keepdim=True)
          %6 = div(%3, %5)
          %7 = view(%6, shape=[1, T, 2])
          return %7, %4
        } where {
          @v: f32[5, 6]
        }""")
    after = without_unit_dims(before)
    assert_equal_results(before, after)
    golden(str(after))


def without_free_dims(op: Op, sample: Case) -> Graph:
    """`op` on its sample with every dim that it takes any number of cut to 1."""
    node = sample.node([param(name=f"x{i}", type=t) for i, t in enumerate(sample.args)])
    assert node.axes is not None

    def cut(type_: TensorType, dims: Dims) -> TensorType:
        free = [node.axes is not None and node.axes.free.issuperset(f) for f in dims]
        sizes = zip(type_.shape, free, strict=True)
        return type_.with_shape(tuple(1 if one else d for d, one in sizes))

    args = tuple(
        param(name=f"x{i}", type=cut(a.type, dims))
        for i, (a, dims) in enumerate(zip(node.args, node.axes.operands, strict=True))
    )
    attrs = dict(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = cut(node.types[0], node.axes.results[0]).shape
    return Graph("unit", args, node.rebuilt(args, attrs).results)


WITH_RULES = [(op, sample) for op, sample in sampled_ops() if op.axes is not None]


@pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(op, s, id=f"{op.name}-{i}") for i, (op, s) in enumerate(WITH_RULES)],
)
def test_every_op_does_without_the_unit_dims_that_its_rule_says(op: Op, sample: Case) -> None:
    graph = without_free_dims(op, sample)
    for one in unit_dims_dropped(graph):
        check_rewrite(graph, one)
    verify(Log().apply(graph, list(unit_dims_dropped(graph))))
