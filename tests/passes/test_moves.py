"""What passes do to weights: concatenation and rows in every format, and the rows of products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph, Value
from ingot.compiler.ops import pointwise, shape
from ingot.compiler.ops.leaf import constant, param
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.mxfp4 import mxfp4, mxfp4_encode
from ingot.compiler.rewrite import Decline
from ingot.compiler.types import TensorType, symbol
from ingot.passes.moves import Rows, concatenated, is_projection, one_product, sliced
from pass_checks import random_weights

X = param(name="x", type=TensorType("f32", (symbol("T"), 64)))


def weight(name: str, *dims: int, dtype: str = "f32") -> Value:
    return constant(name=name, type=TensorType(dtype, dims))


def packed(name: str, *dims: int, group: int = 32, dtype: str = "f32") -> Value:
    codes, scales = mxfp4_encode.all(weight(name, *dims), group=group, scale="even")
    return mxfp4(codes, scales, dtype=dtype)


def value_of(value: Value) -> torch.Tensor:
    graph = Graph("g", (), (value,))
    return interpret(graph, {}, random_weights(graph)).outputs[0]


def test_dense_weights() -> None:
    parts = [weight("a", 3, 64), weight("b", 5, 64)]
    joined = concatenated(parts)
    assert joined.op is shape.cat
    assert torch.equal(value_of(joined), torch.cat([value_of(p) for p in parts]))
    assert concatenated(parts[:1]) == parts[0]


SIZES = {
    0: [(3, 2, 64), (5, 2, 64)],
    1: [(2, 3, 64), (2, 5, 64)],
    -2: [(2, 3, 64), (2, 5, 64)],
    -1: [(2, 3, 64), (2, 3, 128)],
}


@pytest.mark.parametrize("dim", SIZES)
def test_packed_weights_stay_packed(dim: int) -> None:
    sizes = SIZES[dim]
    parts = [packed(name, *dims) for name, dims in zip("ab", sizes, strict=True)]
    joined = concatenated(parts, dim)
    assert joined.op is mxfp4
    assert torch.equal(value_of(joined), torch.cat([value_of(p) for p in parts], dim))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([packed("a", 3, 64), weight("b", 5, 64)], "several formats .*f32, mxfp4g32"),
        ([packed("a", 3, 64), packed("b", 5, 64, group=16)], "mxfp4g16, mxfp4g32"),
        ([packed("a", 3, 64), packed("b", 5, 64, dtype="bf16")], "several formats"),
    ],
)
def test_declines(parts: list[Value], reason: str) -> None:
    with pytest.raises(Decline, match=reason):
        concatenated(parts)


@pytest.mark.parametrize("step", [1, 2])
def test_rows_of_packed_weights(step: int) -> None:
    whole = packed("a", 6, 64)
    rows = sliced(whole, 0, 1, 5, step)
    assert rows.op is mxfp4
    assert torch.equal(value_of(rows), value_of(whole)[1:5:step])
    assert sliced(whole, 0, 0, 6) == whole


def test_columns_of_packed_weights() -> None:
    whole = packed("a", 6, 64)
    columns = sliced(whole, 1, 32, 64)
    assert columns.op is mxfp4
    assert torch.equal(value_of(columns), value_of(whole)[:, 32:])
    with pytest.raises(Decline, match="cuts groups of 32 packed elements"):
        sliced(whole, 1, 16, 48)


def test_adjacent_slices_are_one() -> None:
    whole = weight("a", 6, 64)
    low, high = sliced(whole, 0, 0, 2), sliced(whole, 0, 2, 6)
    assert concatenated([low, high]) == whole
    assert concatenated([high, low]).op is shape.cat


def test_biases() -> None:
    plain = Rows.of(linear(X, weight("a", 3, 64)))
    biased = Rows.of(linear(X, weight("b", 5, 64), bias=weight("bias", 5)))
    assert one_product([plain, plain])[1] is None
    both = one_product([plain, biased])[1]
    assert both is not None
    expected = torch.cat([torch.zeros(3), value_of(weight("bias", 5))])
    assert torch.equal(value_of(both), expected)


@pytest.mark.parametrize("make", [weight, packed])
def test_rows_of_a_product_that_is_moved(make: Any) -> None:
    product = linear(X, make("a", 12, 64), bias=weight("bias", 12))
    heads = shape.view(product, shape=(symbol("T"), 4, 3))
    moved = shape.permute(shape.slice_(heads, dim=1, start=1, stop=3), dims=(0, 2, 1))
    rows = Rows.of(moved)
    assert (rows.x, len(rows.nodes)) == (X, 4)
    assert rows.bias is not None
    assert (rows.weight.op is mxfp4) == (make is packed)
    whole = value_of(make("a", 12, 64)).view(4, 3, 64)
    assert torch.equal(value_of(rows.weight), whole[1:3].permute(1, 0, 2))
    assert torch.equal(value_of(rows.bias), value_of(weight("bias", 12)).view(4, 3)[1:3].T)


def test_what_is_a_projection() -> None:
    assert is_projection(linear(X, packed("a", 3, 64)))
    assert is_projection(linear(X, shape.slice_(weight("a", 3, 64), dim=0, start=0, stop=2)))
    assert not is_projection(linear(X, pointwise.mul(weight("a", 3, 64), param_row())))


def param_row() -> Value:
    return param(name="row", type=TensorType("f32", (64,)))
