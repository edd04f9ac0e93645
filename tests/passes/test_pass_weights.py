"""What passes do to weights: concatenation in every format, and what counts as a weight."""

from __future__ import annotations

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
from ingot.passes.fusion.weights import (
    concatenated,
    concatenated_biases,
    is_quantized,
    is_weight,
    rows_of,
)
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
    assert is_quantized(joined)
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
    rows = rows_of(whole, 1, 5, step)
    assert is_quantized(rows)
    assert torch.equal(value_of(rows), value_of(whole)[1:5:step])
    assert rows_of(whole, 0, 6) == whole
    with pytest.raises(Decline, match="not cut along the dim of their scales"):
        rows_of(packed("a", 64), 0, 32)


def test_biases() -> None:
    plain = linear(X, weight("a", 3, 64))
    biased = linear(X, weight("b", 5, 64), bias=weight("bias", 5))
    assert concatenated_biases([plain, plain]) is None
    both = concatenated_biases([plain, biased])
    assert both is not None
    expected = torch.cat([torch.zeros(3), value_of(weight("bias", 5))])
    assert torch.equal(value_of(both), expected)


def test_what_is_a_weight() -> None:
    assert is_weight(weight("a", 3, 64))
    assert is_weight(packed("a", 3, 64))
    assert is_weight(shape.slice_(weight("a", 3, 64), dim=0, start=0, stop=2))
    assert not is_weight(X)
    assert not is_weight(pointwise.mul(X, weight("a", 64)))
