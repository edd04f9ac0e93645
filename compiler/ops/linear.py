"""Products: linear, matmul, and the embedding lookup."""

from __future__ import annotations

from typing import Any

import torch

from ..ir import Cost, Op, Sample
from ..types import FLOATS, TensorType, Types, VerifyError
from .pointwise import broadcast

# CPU BLAS rounds rows differently by how many they are: fewer than 8, the rest after the last 8,
# and with one column or an odd K also by where a row starts (seen with MKL in f32 and f64, and with
# the rows shared out among threads). Whole blocks of 8 rows of 8 numbers all go the same way.
_BLOCK = 8


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., T, K] · weightᵀ [..., K, N] (+ bias [N]) -> [..., T, N].

    Each row is bit-identical whatever the other rows are, in f32 and bf16: rows are padded to whole
    blocks, so that a token's result does not depend on what else is in its batch.
    """
    rows, inner = x.shape[-2:]
    if rows % _BLOCK or inner % _BLOCK:
        x = torch.nn.functional.pad(x, (0, -inner % _BLOCK, 0, -rows % _BLOCK))
    if inner % _BLOCK:
        weight = torch.nn.functional.pad(weight, (0, -inner % _BLOCK))
    if weight.ndim == 2:
        return torch.nn.functional.linear(x, weight, bias)[..., :rows, :]
    return (x @ weight.transpose(-1, -2))[..., :rows, :]


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
    flops = 2 * results[0].numel * args[1].shape[1]
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
)
