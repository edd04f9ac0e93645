"""Products: linear, one a head, matmul, and the embedding lookup."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import batched_matmul, rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Sample
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError
from .pointwise import broadcast

# CPU BLAS rounds a row differently by how many there are: fewer than 8, those after the last whole
# 8, and with an odd K or few columns also by where the row starts; and by strides (seen with MKL in
# f32, with one and more threads). Dense whole blocks of 8 all go the same way.
_BLOCK = 8


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., T, K] · weightᵀ [..., K, N] (+ bias [N], if weight is [N, K]) -> [..., T, N].

    Each row is bit-identical whatever the other rows are, in f32 and bf16: operands are padded to
    whole blocks, so that a token's result does not depend on what else is in its batch. Computed in
    f32 and rounded once (which on a CPU without bf16 units is also many times faster).
    """
    (rows, inner), columns, dtype = x.shape[-2:], weight.shape[-2], x.dtype
    x = _padded(wide(x), rows, inner)
    if weight.ndim == 2:
        weight = _padded(wide(weight), 0, inner)
        bias = None if bias is None else wide(bias)
        return torch.nn.functional.linear(x, weight, bias)[..., :rows, :].to(dtype)
    y = _padded(wide(weight).transpose(-1, -2), inner, columns)
    return (x @ y)[..., :rows, :columns].to(dtype)


def _padded(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`x` dense, with zeros after its last rows and columns up to whole blocks."""
    missing = (0, -columns % _BLOCK, 0, -rows % _BLOCK)
    return torch.nn.functional.pad(x, missing) if any(missing) else x.contiguous()


def _linear_infer(x: TensorType, weight: TensorType, bias: TensorType | None = None) -> Types:
    fits = x.rank >= 1 and weight.rank == 2 and x.shape[-1] == weight.shape[1]
    if not fits or x.dtype != weight.dtype or x.dtype not in FLOATS:
        raise VerifyError(
            f"linear: expected x [..., K] and weight [N, K] of one float dtype, "
            f"found {x} and {weight}"
        )
    if bias is not None and bias != TensorType(x.dtype, weight.shape[:1]):
        raise VerifyError(f"linear: expected a bias [{weight.shape[0]}] of x's dtype, found {bias}")
    return (x.with_shape((*x.shape[:-1], weight.shape[0])),)


def _linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor]:
    result = product(x.reshape(-1, x.shape[-1]), weight, bias)
    return (result.view(*x.shape[:-1], weight.shape[0]),)


def _linear_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    flops = 2 * results[0].numel * args[1].shape[-1]
    return Cost(flops, sum((t.nbytes for t in (*args, *results)), 0))


linear = Op(
    "linear",
    _linear_infer,
    _linear_reference,
    _linear_cost,
    (
        Sample((TensorType("f32", (3, 8)), TensorType("f32", (5, 8)))),
        Sample((TensorType("f32", (3, 8)), TensorType("f32", (5, 8)), TensorType("f32", (5,)))),
    ),
    axes=rule("x[*,k] weight[n,k] +bias[n]? -> [*,n]; k sum"),
)


# ---- head_linear: each head's rows by that head's weight, x [T, H, K] · weightᵀ [H, K, N]


def _head_linear_infer(x: TensorType, weight: TensorType) -> Types:
    fits = x.rank == weight.rank == 3 and x.shape[1:] == (weight.shape[0], weight.shape[2])
    if not fits or x.dtype != weight.dtype or x.dtype not in FLOATS:
        raise VerifyError(
            f"head_linear: expected x [T, H, K] and weight [H, N, K] of one float dtype, "
            f"found {x} and {weight}"
        )
    return (x.with_shape((*x.shape[:2], weight.shape[1])),)


def _head_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
    return (product(x.transpose(0, 1), weight).transpose(0, 1),)


head_linear = Op(
    "head_linear",
    _head_linear_infer,
    _head_linear_reference,
    _linear_cost,
    (Sample((TensorType("f32", (5, 3, 8)), TensorType("f32", (3, 6, 8)))),),
    axes=rule("x[t,h,k] weight[h,n,k] -> [t,h,n]; k sum"),
)


def _matmul_infer(x: TensorType, y: TensorType) -> Types:
    fits = x.rank >= 2 and y.rank >= 2 and x.shape[-1] == y.shape[-2]
    if not fits or x.dtype != y.dtype or x.dtype not in FLOATS:
        raise VerifyError(
            f"matmul: expected [..., M, K] and [..., K, N] of one float dtype, found {x} and {y}"
        )
    batch = broadcast("matmul", x.shape[:-2], y.shape[:-2]) if max(x.rank, y.rank) > 2 else ()
    return (x.with_shape((*batch, x.shape[-2], y.shape[-1])),)


def _matmul_reference(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
    return (product(x, y.transpose(-1, -2)),)


def _matmul_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    flops = 2 * results[0].numel * args[0].shape[-1]
    return Cost(flops, sum((t.nbytes for t in (*args, *results)), 0))


matmul = Op(
    "matmul",
    _matmul_infer,
    _matmul_reference,
    _matmul_cost,
    (Sample((TensorType("f32", (2, 3, 4)), TensorType("f32", (2, 4, 5)))),),
    axes=batched_matmul,
)


def _embedding_infer(ids: TensorType, table: TensorType) -> Types:
    if ids.dtype not in ("i32", "i64") or table.rank != 2 or table.dtype not in FLOATS:
        raise VerifyError(
            f"embedding: expected integer ids and a table [V, D], found {ids}, {table}"
        )
    return (TensorType(table.dtype, (*ids.shape, table.shape[1])),)


def _embedding_reference(ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.nn.functional.embedding(ids, table),)


def _embedding_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    return Cost(0, results[0].nbytes * 2 + args[0].nbytes)


embedding = Op(
    "embedding",
    _embedding_infer,
    _embedding_reference,
    _embedding_cost,
    (Sample((TensorType("i32", (3,)), TensorType("f32", (7, 4))), high=7),),
    axes=rule("ids[*] table[v,d] -> [*,d]; v by ids"),
)
