"""Cuts: a cut of a result, from cuts of the arguments, is the slice of the whole result."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch
from ingot.compiler.interpret import compute, random_tensor
from ingot.compiler.ir import Node, Op, Sample, Value, walk
from ingot.compiler.ops import attention, draft, linear, moe, norm, pointwise, reduce, rope, shape
from ingot.compiler.ops.leaf import constant, param
from ingot.compiler.ops.mxfp4 import mxfp4
from ingot.compiler.ops.mxfp4_fragments import mxfp4_fragments
from ingot.compiler.types import TensorType
from ingot.passes.moves import concatenated
from ingot.passes.transforms.propagate_slice import (
    Cut,
    Misaligned,
    cut_weight,
    propagate_slice,
)
from op_cases import Case, sampled_ops

F = "f32"
# Beside the samples of the ops: dims that are cut in places where the samples have none.
MORE = {
    linear.linear: [Sample((TensorType(F, (3, 4, 8)), TensorType(F, (6, 8))),
                           {"bias": TensorType(F, (6,))})],
    linear.embedding: [Sample((TensorType("i64", (4, 3)), TensorType(F, (7, 6))), high=7)],
    pointwise.add: [Sample((TensorType(F, (4, 1, 6)), TensorType(F, (3, 6))))],
    shape.view: [
        Sample((TensorType(F, (3, 24)),), {"shape": (3, 4, 6)}),
        Sample((TensorType(F, (3, 4, 6)),), {"shape": (3, 24)}),
        Sample((TensorType(F, (3, 4, 6)),), {"shape": (3, 1, 2, 12)}),
        Sample((TensorType(F, (3, 2, 2, 6)),), {"shape": (3, 4, 6)}),
    ],
    shape.permute: [Sample((TensorType(F, (3, 4, 6)),), {"dims": (2, 0, 1)})],
    shape.slice_: [Sample((TensorType(F, (3, 12)),),
                          {"dim": 1, "start": 1, "stop": 11, "step": 3})],
    shape.cat: [Sample((TensorType(F, (3, 4)), TensorType(F, (3, 2)), TensorType(F, (3, 5))),
                       {"dim": 1})],
    rope.rope: [
        Sample((TensorType(F, (5, 4, 8)), *[TensorType(F, (5, 4))] * 2), {"form": "half"})
    ],
    norm.rms_norm: [Sample((TensorType(F, (3, 4, 8)),),
                           {"weight": TensorType(F, (8,)), "eps": 1e-6})],
    attention.attention: [
        Sample((TensorType(F, (5, 6, 4)), TensorType(F, (5, 3, 4)), TensorType(F, (5, 3, 2))),
               {"sinks": TensorType(F, (6,)), "scale": 0.5}),
        Sample((TensorType(F, (5, 4, 4)), *[TensorType(F, (5, 1, 4))] * 2), {"scale": 0.5}),
    ],
    mxfp4: [Sample((TensorType("u8", (4, 48)), TensorType("u8", (4, 3))), {"dtype": F}, high=99)],
}  # fmt: skip


def nodes_of(op: Op) -> Iterator[tuple[Node, list[torch.Tensor]]]:
    for sample in (*op.samples, *MORE.get(op, ())):
        case = Case.of(op, sample)
        params = tuple(param(name=f"x{i}", type=t) for i, t in enumerate(case.args))
        values = [random_tensor(t, high=case.high) for t in case.args]
        yield case.node(params), values


# An index of arange is its place: a slice of it is no arange from the same start. What follows a
# token may be a result of any row.
OPS = [op for op in dict.fromkeys(op for op, _ in sampled_ops()) if op.axes is not None]
OPS = [op for op in OPS if op not in (shape.arange, moe.router, reduce.topk, draft.follow)]
OPS = [op for op in OPS if any(len(node.types) == 1 for node, _ in nodes_of(op))]


def taken(value: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    return value if cut is None else value.narrow(cut.axis, cut.start, cut.size)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_cut_is_the_slice(op: Op) -> None:
    pushes = 0
    for node, values in (n for n in nodes_of(op) if len(n[0].types) == 1):
        (whole,) = compute(node, tuple(values), {})
        held = dict(zip(node.args, values, strict=True))
        for axis, size in enumerate(node.types[0].shape):
            for start, stop in combinations(range(size + 1), 2):
                cut = Cut(axis, start, stop)
                try:
                    inner = propagate_slice(node, cut)
                except Misaligned:
                    continue
                if inner is None:
                    continue
                pushes += 1
                given = tuple(taken(held[a], c) for a, c in inner.args)
                args = tuple(
                    param(name=f"y{i}", type=a.type if c is None else c.of(a).type)
                    for i, (a, c) in enumerate(inner.args)
                )
                made = node.rebuilt(args, inner.attrs)
                assert made.types[0].shape == taken(whole, cut).shape
                (found,) = compute(made, given, {})
                expected = taken(whole, cut)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert pushes


def test_ops_of_several_results_or_without_a_rule_need_everything() -> None:
    for op in (moe.router, reduce.topk, mxfp4_fragments):
        for node, _ in nodes_of(op):
            assert propagate_slice(node, Cut(0, 0, 1)) is None


def weight(name: str, *dims: int, dtype: str = F) -> Value:
    return constant(name=name, type=TensorType(dtype, dims))


def loads(value: Value) -> list[str]:
    """What is read of the weights: where slices of them are, they are the only use."""
    read: list[str] = []
    nodes = list(walk((value,)))
    for node in nodes:
        for arg in node.args:
            if arg.op is constant:
                attrs = node.attrs
                part = f"[{attrs['dim']}: {attrs['start']}..{attrs['stop']}]"
                read.append(f"{arg.attrs['name']}{part if node.op is shape.slice_ else ''}")
    return read


def test_cut_of_a_weight_goes_down_to_what_is_read() -> None:
    turned = shape.permute(weight("w", 8, 6, 4), dims=(0, 2, 1))  # [8, 4, 6]
    assert loads(cut_weight(turned, Cut(1, 1, 3))) == ["w[2: 1..3]"]
    gate, up = (shape.slice_(turned, dim=1, start=s, stop=4, step=2) for s in (0, 1))
    both = shape.cat(gate, up, dim=1)
    assert loads(cut_weight(both, Cut(0, 2, 4))) == ["w[0: 2..4]"] * 2
    assert loads(cut_weight(both, Cut(1, 3, 4))) == ["w[2: 3..4]"]
    heads = shape.view(weight("w", 24, 5), shape=(4, 6, 5))
    assert loads(cut_weight(heads, Cut(0, 1, 2))) == ["w[0: 6..12]"]
    whole = weight("w", 4, 4)
    assert cut_weight(whole, Cut(0, 0, 4)) is whole


def test_cut_past_the_end_is_padded() -> None:
    for start, stop, kept in ((2, 6, 2), (4, 8, 0), (6, 8, 0)):
        cut = cut_weight(weight("w", 4, 3), Cut(0, start, stop))
        assert cut.type.shape == (stop - start, 3)
        assert len(loads(cut)) == bool(kept)


def packed(rows: int, inner: int, group: int) -> Value:
    codes = weight("c", rows, inner // 2, dtype="u8")
    return mxfp4(codes, weight("s", rows, inner // group, dtype="u8"), dtype=F)


def test_packed_weights_stay_packed() -> None:
    cut = cut_weight(packed(8, 64, 32), Cut(0, 4, 8))
    assert cut.op is mxfp4 and loads(cut) == ["c[0: 4..8]", "s[0: 4..8]"]
    cut = cut_weight(packed(8, 64, 32), Cut(1, 32, 64))
    assert cut.op is mxfp4 and loads(cut) == ["c[1: 16..32]", "s[1: 1..2]"]
    padded = cut_weight(packed(8, 64, 32), Cut(0, 6, 12))
    assert padded.op is mxfp4 and padded.type.shape == (6, 64)
    both = concatenated([cut_weight(packed(8, 64, 32), c) for c in (Cut(0, 0, 2), Cut(0, 4, 6))])
    assert both.op is mxfp4
    assert loads(both) == ["c[0: 0..2]", "c[0: 4..6]", "s[0: 0..2]", "s[0: 4..6]"]
    with pytest.raises(Misaligned, match="2 blocks of 32 are cut in parts of 16"):
        cut_weight(packed(8, 64, 32), Cut(1, 0, 16))


def test_heads_that_are_cut_through() -> None:
    x: Any = param(name="x", type=TensorType(F, (3, 4, 6)))
    flat = shape.view(x, shape=(3, 24))
    with pytest.raises(Misaligned, match="4 blocks of 6 are cut in parts of 8"):
        propagate_slice(flat.node, Cut(1, 0, 8))
    inner = propagate_slice(flat.node, Cut(1, 6, 12))
    assert inner and inner.args == ((x, Cut(1, 1, 2)),)
