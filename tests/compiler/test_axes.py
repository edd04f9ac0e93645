"""Axis rules: what a rule says of an op is so of its reference, for every op and every sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from ingot.compiler.axes import Axes, Dims, position, reshaped, rule
from ingot.compiler.interpret import random_tensor
from ingot.compiler.ir import Node, Op, Sample
from ingot.compiler.ops import attention, heads, linear, mla, moe, pointwise, rope, shape
from ingot.compiler.ops.aten import aten_op
from ingot.compiler.ops.latent_attention import latent_attention
from ingot.compiler.ops.leaf import param
from ingot.compiler.ops.project_attention import project_attention
from ingot.compiler.types import TensorType, symbol
from op_cases import Case as OpCase
from op_cases import sampled_ops

F = "f32"


def t(*dims: Any, dtype: str = F) -> TensorType:
    return TensorType(dtype, dims)


# Beside the samples of the ops: more dims, dims that are broadcast, dims that are made of several.
MORE: list[tuple[Op, Sample]] = [
    (linear.linear, Sample((t(3, 4, 8), t(6, 8)), {"bias": t(6)})),
    (linear.linear, Sample((t(8), t(6, 8)))),
    (linear.embedding, Sample((t(4, 3, dtype="i64"), t(7, 6)), high=7)),
    (linear.matmul, Sample((t(2, 1, 3, 4), t(5, 4, 2)))),
    (pointwise.add, Sample((t(4, 1, 6), t(3, 6)))),
    (shape.view, Sample((t(3, 24),), {"shape": (3, 4, 6)})),
    (shape.view, Sample((t(3, 4, 6),), {"shape": (3, 24)})),
    (shape.view, Sample((t(3, 4, 6),), {"shape": (3, 1, 2, 12)})),
    (shape.view, Sample((t(3, 2, 2, 6),), {"shape": (3, 4, 6)})),
    (shape.view, Sample((t(3, 6, 4),), {"shape": (3, 4, 6)})),
    (shape.view, Sample((t(2, 3, 5),), {"shape": (3, 2, 5)})),
    (shape.permute, Sample((t(3, 4, 6),), {"dims": (2, 0, 1)})),
    (shape.cat, Sample((t(3, 4), t(3, 2), t(3, 5)), {"dim": 1})),
    (rope.rope, Sample((t(5, 4, 8), t(5, 4), t(5, 4)), {"form": "half"})),
    (attention.attention, Sample((t(5, 6, 4), t(5, 3, 4), t(5, 3, 2)),
                                   {"sinks": t(6), "scale": 0.5})),
    (moe.experts, Sample((t(5, 8), t(5, 2), t(5, 2, dtype="i64"), t(4, 6, 8), t(4, 8, 6)),
                         {"activation": "relu", "gated": False}, high=4)),
    (aten_op("aten.hypot.default"), Sample((t(3, 4), t(4)))),
    (aten_op("aten.polar.default"), Sample((t(3, 4), t(3, 4)))),
    (aten_op("aten.view_as_complex.default"), Sample((t(3, 4, 2),))),
    (aten_op("aten.view_as_real.default"), Sample((t(3, 4, dtype="c64"),))),
]  # fmt: skip
# Ops without a rule, and those whose operands hang together (CACHED).
OPAQUE = {"param", "constant", "literal", "mxfp4_fragments", "mxfp4_tiled", "region"}
Case = tuple[Node, list[torch.Tensor]]


def case(op: Op, sample: OpCase) -> Case:
    params = tuple(param(name=f"x{i}", type=x) for i, x in enumerate(sample.args))
    generator = torch.Generator().manual_seed(0)
    values = [random_tensor(x, generator, sample.high) for x in sample.args]
    if op.name in ("log", "sqrt", "rsqrt", "pow"):
        values = [x.abs() + 0.5 for x in values]
    return sample.node(params), values


def cached() -> Iterator[Case]:
    """The ops of the paged cache, on two sequences and a token of padding."""
    rows, caches = (t(5, 2, 8), t(5, 2, 6)), (t(6, 4, 2, 8), t(6, 4, 2, 6))
    index = [
        torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32),
        torch.tensor([3, 5, 0, 6, 4], dtype=torch.int32),
        torch.tensor([[4, 0], [2, 5]], dtype=torch.int32),
    ]
    index_types = tuple(t(*x.shape, dtype="i32") for x in index)
    latent = (t(5, 3, 10), t(5, 3, 4), t(6, 4, 14))
    q, sunk = t(5, 4, 8), {"sinks": t(4), "scale": 0.3, "window": 3}
    for op, floats, named in (
        (attention.kv_append, (*caches, *rows), {}),
        (attention.cached_attention, (q, *caches), {"scale": 0.3}),
        (attention.cached_attention, (q, *caches), sunk),
        (mla.cached_mla_attention, latent, {"scale": 0.3}),
    ):
        node, values = case(op, OpCase.of(op, Sample((*floats, *index_types), named)))
        at = len(floats)
        yield node, [*values[:at], *index, *values[at + len(index) :]]
    places = dict(zip(("slots", "positions", "page_table"), index_types, strict=True))
    k_and_v = {"cache_1": caches[0], "cache_2": caches[1], "heads": (3, 2, 2), "dims": (8, 8, 6)}
    attends = {"k_cache": caches[0], "v_cache": caches[1], "heads": (4, 2, 2), "dims": (8, 8, 6)}
    attends["scale"] = 0.3
    summed = {"norm": t(10), "delta": t(5, 10), "eps": 1e-5}
    row = (t(5, 14), t(10), t(5, 2), t(5, 2))
    of_rows = {"cache": latent[2], "eps": 1e-5, "form": "half", "scale": 0.3}
    for op, floats, named in (
        (heads.project_heads, (t(5, 10), t(52, 10)), k_and_v),
        (heads.project_heads, (t(5, 10), t(52, 10)), {**k_and_v, **summed}),
        (project_attention, (t(5, 10), t(60, 10)), attends),
        (project_attention, (t(5, 10), t(60, 10)), {**attends, **summed, "sinks": t(4)}),
        (mla.mla_latent, row, {"cache": latent[2], "eps": 1e-5, "form": "half"}),
        (latent_attention, (*latent[:2], *row), {**of_rows, "rotate": False}),
        (latent_attention, (*latent[:2], *row), {**of_rows, "rotate": True}),
    ):
        node, values = case(op, OpCase.of(op, Sample(floats, {**named, **places})))
        yield node, [*values[: -len(index)], *index]


def more_cases() -> list[tuple[Op, OpCase]]:
    return [(op, OpCase.of(op, sample)) for op, sample in MORE]


CASES = [case(*c) for c in (*sampled_ops(), *more_cases()) if c[0].axes] + list(cached())
every_case = pytest.mark.parametrize(
    ("node", "values"), [pytest.param(*c, id=f"{c[0].op.name}-{i}") for i, c in enumerate(CASES)]
)


def axes_of(node: Node) -> Axes:
    assert node.axes is not None
    return node.axes


def taken(x: torch.Tensor, dims: Dims, axes: Axes, label: str, at: Sequence[int]) -> torch.Tensor:
    """The indices `at` of `label`, a factor of one of the dims of `x` or of none."""
    axis = position(dims, label)
    if axis is None:
        return x
    sizes: list[Any] = [axes.sizes[f] for f in dims[axis]]
    whole = x.unflatten(axis, sizes)
    inner = axis + dims[axis].index(label)
    return whole.index_select(inner, torch.tensor(at)).flatten(axis, axis + len(sizes) - 1)


def run(node: Node, values: Sequence[torch.Tensor], **attrs: Any) -> tuple[torch.Tensor, ...]:
    required, optional = node.taken(values)
    return node.op.reference(*required, **{**optional, **node.attrs, **attrs})


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_every_op_has_a_rule_or_is_known_to_have_none() -> None:
    without = {name for name, op in Op.registry.items() if op.axes is None}
    assert {n for n in without if not n.startswith(("aten.", "test."))} == OPAQUE
    assert {n.op.name for n, _ in CASES} >= {
        n for n, op in Op.registry.items() if op.axes and not n.startswith(("aten.", "test."))
    }


@every_case
def test_labels_fit_the_types(node: Node, values: list[torch.Tensor]) -> None:
    axes = axes_of(node)
    operands = zip(axes.operands, (a.type for a in node.args), strict=True)
    for dims, type_ in (*operands, *zip(axes.results, node.types, strict=True)):
        assert len(dims) == type_.rank
        for factors, size in zip(dims, type_.shape, strict=True):
            if factors and factors[0].startswith("~"):
                assert size == 1
            elif factors != (axes.along,):
                assert axes.size(factors) == size
    kinds = (axes.sums, axes.dots, axes.whole, axes.by.keys())
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))


@every_case
def test_each_index_of_a_plain_label_is_computed_by_itself(
    node: Node, values: list[torch.Tensor]
) -> None:
    axes, whole = axes_of(node), run(node, values)
    for label in filter(axes.is_plain, axes.sizes):
        size: Any = axes.sizes[label]
        for at in (list(range(size))[::-1], list(range(size // 2, size)), [0], [size - 1, 0, 0]):
            given = [
                taken(x, dims, axes, label, at)
                for x, dims in zip(values, axes.operands, strict=True)
            ]
            expected = [
                taken(x, dims, axes, label, at) for x, dims in zip(whole, axes.results, strict=True)
            ]
            shapes = {"shape": tuple(expected[0].shape)} if "shape" in node.attrs else {}
            for a, b in zip(run(node, given, **shapes), expected, strict=True):
                assert_equal(a, b)


@every_case
def test_partial_sums_add_up(node: Node, values: list[torch.Tensor]) -> None:
    axes, whole = axes_of(node), run(node, values)
    for label in axes.sums:
        size: Any = axes.sizes[label]
        cut = size // 3
        total: Any = 0
        for first, part in ((True, range(cut)), (False, range(cut, size))):
            given = [
                taken(x, dims, axes, label, list(part)) if first or i not in axes.added else 0 * x
                for i, (x, dims) in enumerate(zip(values, axes.operands, strict=True))
            ]
            total = total + run(node, given)[0]
        assert_equal(total, whole[0])


@every_case
def test_contracted_operands_may_be_rotated_together(
    node: Node, values: list[torch.Tensor]
) -> None:
    """(x·Q)·(W·Q)ᵀ == x·Wᵀ for an orthonormal Q, where a label is the last dim of several."""
    axes, whole = axes_of(node), run(node, values)
    for label in axes.sums | axes.dots:
        holders = [i for i, dims in enumerate(axes.operands) if dims and dims[-1] == (label,)]
        if len(holders) < 2:
            continue
        assert sum(position(d, label) is not None for d in axes.operands) == len(holders)
        size: Any = axes.sizes[label]
        generator = torch.Generator().manual_seed(1)
        q = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        given = [x.float() @ q if i in holders else x for i, x in enumerate(values)]
        for a, b in zip(run(node, given), whole, strict=True):
            assert_equal(a, b)


@every_case
def test_indices_name_places(node: Node, values: list[torch.Tensor]) -> None:
    """A table in another order, with indices that follow, gives the same."""
    axes, whole = axes_of(node), run(node, values)
    for label, index in axes.by.items():
        size: Any = axes.sizes[label]
        order = [*range(1, size), 0]
        given = [
            taken(x, dims, axes, label, order)
            for x, dims in zip(values, axes.operands, strict=True)
        ]
        given[index] = (values[index] - 1) % size
        for a, b in zip(run(node, given), whole, strict=True):
            assert_equal(a, b)


T = symbol("T")
VIEWS = [
    ((1, T, 24), (T, 4, 6), "(); d0; d1 d2", "d0; d1; d2"),
    ((T, 8), (4 * T, 2), "d0; d1 d2", "d0 d1; d2"),
    ((T, 8), (8, T), "d0; d1", "d2; d3"),
    ((2 * T, 3), (T, 6), "d0 d1; d2", "d0; d1 d2"),
    ((4, T, 6), (4, 3, 2 * T), "d0; d1; d2", "d0; d3; d4"),
    ((6, 4, 5), (4, 6, 5), "d0 d1; d2 d3; d4", None),
    ((), (1, 1), "", "(); ()"),
    ((0, 4), (4, 0), "d0; d1", "d2; d3"),
]


@pytest.mark.parametrize(("old", "new", "operand", "result"), VIEWS)
def test_views_are_products_of_common_factors(
    old: Any, new: Any, operand: str, result: str | None
) -> None:
    axes = reshaped({"x": t(*old)}, (t(*new),), {})

    def shown(dims: Dims) -> str:
        return "; ".join(" ".join(f) or "()" for f in dims)

    if result is not None:
        assert (shown(axes.operands[0]), shown(axes.results[0])) == (operand, result)
    whole = [d for d in axes.sizes if not axes.is_plain(d)]
    shared = {f for d in axes.operands[0] for f in d} & {f for d in axes.results[0] for f in d}
    assert not shared & set(whole)


@pytest.mark.parametrize("text", ["x[*] weight -> [*]", "x[*] -> [*]; k is summed", "x{k} -> [k]"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="axis rule: expected"):
        rule(text)
