"""What passes do to weights: concatenation in every format, and what counts as a weight."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.interpret import interpret
from ingot.compiler.ir import Graph, Value
from ingot.compiler.ops import pointwise, shape
from ingot.compiler.ops.leaf import constant, param
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.mxfp4 import mxfp4
from ingot.compiler.rewrite import Decline
from ingot.compiler.types import TensorType, symbol
from ingot.passes.weights import concatenated, concatenated_biases, is_weight
from pass_checks import random_weights

X = param(name="x", type=TensorType("f32", (symbol("T"), 64)))


def weight(name: str, *dims: int, dtype: str = "f32") -> Value:
    return constant(name=name, type=TensorType(dtype, dims))


def value_of(value: Value) -> torch.Tensor:
    graph = Graph("g", (), (value,))
    return interpret(graph, {}, random_weights(graph)).outputs[0]


def test_dense_weights() -> None:
    parts = [weight("a", 3, 64), weight("b", 5, 64)]
    joined = concatenated(parts)
    assert joined.op is shape.cat
    assert torch.equal(value_of(joined), torch.cat([value_of(p) for p in parts]))
    assert concatenated(parts[:1]) == parts[0]


def packed(name: str, *dims: int, group: int = 32, dtype: str = "f32") -> Value:
    codes = weight(f"{name}.codes", *dims[:-1], dims[-1] // 2, dtype="u8")
    scales = weight(f"{name}.scales", *dims[:-1], dims[-1] // group, dtype="u8")
    return mxfp4(codes, scales, dtype=dtype)


@pytest.mark.parametrize(("first", "second", "dim"), [((3, 64), (5, 64), 0), ((3, 64), (3, 32), 1)])
def test_packed_weights_stay_packed(
    first: tuple[int, ...], second: tuple[int, ...], dim: int
) -> None:
    parts = [packed("a", *first), packed("b", *second)]
    joined = concatenated(parts, dim)
    assert joined.op is mxfp4
    assert torch.equal(value_of(joined), torch.cat([value_of(p) for p in parts], dim))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (weight("b", 5, 64), "f32, mxfp4g32"),
        (packed("b", 5, 64, group=16), "mxfp4g16, mxfp4g32"),
        (packed("b", 5, 64, dtype="bf16"), "mxfp4g32"),
    ],
)
def test_formats_are_not_mixed(other: Value, message: str) -> None:
    with pytest.raises(Decline, match=f"weights differ in format: {message}"):
        concatenated([packed("a", 3, 64), other])


def test_biases() -> None:
    plain = linear(X, weight("a", 3, 64))
    biased = linear(X, weight("b", 5, 64), weight("bias", 5))
    assert concatenated_biases([plain, plain]) is None
    both = concatenated_biases([plain, biased])
    assert both is not None
    expected = torch.cat([torch.zeros(3), value_of(weight("bias", 5))])
    assert torch.equal(value_of(both), expected)


def test_what_is_a_weight() -> None:
    assert is_weight(weight("a", 3, 64))
    assert is_weight(shape.slice_(weight("a", 3, 64), dim=0, start=0, stop=2))
    assert not is_weight(X)
    assert not is_weight(pointwise.mul(X, weight("a", 64)))
