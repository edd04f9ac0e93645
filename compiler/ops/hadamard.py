"""Rotation of blocks by the Hadamard matrix, which spreads outliers before rounding."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample, moved
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError

# ---- hadamard: x [..., K] -> each block of `block` elements times H_block / sqrt(block)
# (Sylvester's H: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]]). The matrix is orthonormal and
# symmetric, so that the op is its own inverse, and
#   (x·H)·(W·H)ᵀ == x·Wᵀ


def _hadamard_infer(x: TensorType, *, block: int) -> Types:
    inner = x.shape[-1] if x.rank else None
    if block < 1 or block & (block - 1):
        raise VerifyError(f"hadamard: expected a block that is a power of two, found {block}")
    if x.dtype not in FLOATS or not isinstance(inner, int) or inner % block:
        raise VerifyError(
            f"hadamard: expected floats [..., K] with K a multiple of {block}, found {x}"
        )
    return (x,)


def _hadamard_reference(x: torch.Tensor, *, block: int) -> torch.Tensor:
    """By sums and differences, log2(block) times: a row's bits do not depend on other rows."""
    y = wide(x).reshape(-1, 1, block)
    while y.shape[-1] > 1:
        a, b = y.unflatten(-1, (2, -1)).unbind(-2)
        y = torch.stack((a + b, a - b), 2).flatten(1, 2)
    return (y.reshape(x.shape) * block**-0.5).to(x.dtype)


def _hadamard_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    steps = attrs["block"].bit_length() - 1
    return Cost(operands["x"].numel * steps, moved(operands, results))


hadamard = Op(
    "hadamard",
    _hadamard_infer,
    _hadamard_reference,
    _hadamard_cost,
    (
        Sample((TensorType("f32", (3, 64)),), {"block": 32}),
        Sample((TensorType("bf16", (2, 3, 8)),), {"block": 4}),
        Sample((TensorType("f32", (5,)),), {"block": 1}),
    ),
    axes=rule("x[*,(b block)] -> [*,(b block)]; block whole"),
)
