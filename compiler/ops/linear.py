"""Products: linear with what surrounds it, one a head, matmul, and the embedding lookup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from math import prod
from typing import Any

import torch

from ..axes import Axes, batched_matmul, rule
from ..dtypes import FLOATS
from ..ir import Cost, Node, Op, Operands, Sample, moved
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError, dim
from .glu import ACTIVATIONS, CLAMPED, check_activation, gated
from .pointwise import broadcast
from .prologue import PROLOGUE, check_prologue, prologue_flops, run_prologue
from .shape import picked

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


# ---- linear: n · weightᵀ + bias + residual, and s if there is a delta (n and s: see `prologue`).
# x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N]. With a `gate`, the name of an
# activation, weight [2I, K] and bias [2I] have gate rows and then up rows, and of gate ‖ up, what
# they give, the result is activation(gate) · up [..., I] (see `glu`).
# It equals the chain of ops that it stands for, with fewer roundings: the result, s and n are
# rounded, nothing else is.


def _linear_infer(
    x: TensorType,
    weight: TensorType,
    *,
    norm: TensorType | None = None,
    delta: TensorType | None = None,
    post_norm: TensorType | None = None,
    bias: TensorType | None = None,
    residual: TensorType | None = None,
    gate: str | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
    eps: float | None = None,
    post_eps: float | None = None,
) -> Types:
    fits = x.rank >= 1 and weight.rank == 2 and x.shape[-1] == weight.shape[1]
    if not fits or x.dtype != weight.dtype or x.dtype not in FLOATS:
        raise VerifyError(
            f"linear: expected x [..., K] and weight [N, K] of one float dtype, "
            f"found {x} and {weight}"
        )
    if bias is not None and bias != TensorType(x.dtype, weight.shape[:1]):
        raise VerifyError(f"linear: expected a bias [{weight.shape[0]}] of x's dtype, found {bias}")
    sums = check_prologue("linear", x, norm, delta, post_norm, eps, post_eps)
    rows: Any = weight.shape[0]
    if gate is not None:
        check_activation("linear", gate, alpha, limit)
        if not isinstance(rows, int) or rows % 2:
            raise VerifyError(
                f"linear: expected as many gate rows as up rows, found a weight {weight}"
            )
        rows //= 2
    elif alpha or limit:
        raise VerifyError(f"linear: found alpha {alpha} and limit {limit} without a gate")
    result = x.with_shape((*x.shape[:-1], rows))
    if residual is not None and (gate is not None or residual != result):
        raise VerifyError(
            f"linear: expected a residual {result}, and none with a gate; found {residual}"
        )
    return (result, *sums)


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: str | None = None,
    alpha: float = 0.0,
    limit: float = 0.0,
    **prologue: Any,
) -> tuple[torch.Tensor, ...]:
    n, sums = run_prologue(x, **prologue)
    y = product(wide(n).reshape(-1, n.shape[-1]), weight, bias)
    y = y.view(*x.shape[:-1], weight.shape[0])
    if gate is not None:
        first, up = y.chunk(2, -1)
        y = gated(first, up, gate, alpha, limit)
    if residual is not None:
        y = y + wide(residual)
    return (y.to(x.dtype), *sums)


def _linear_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    x, weight = operands["x"], operands["weight"]
    flops = 2 * dim(prod(x.shape[:-1])) * weight.numel + prologue_flops(operands)
    flops += results[0].numel if "residual" in operands else 0
    flops += 5 * results[0].numel if attrs.get("gate") else 0
    return Cost(dim(flops), moved(operands, results))


_AXES = rule(
    "x[*,k] weight[n,k] norm[k]? delta[*,k]? post_norm[k]? +bias[n]? +residual[*,n]? "
    "-> [*,n], [*,k]; k sum; k whole if norm delta"
)
_AXES_WITH_GATE = rule(
    "x[*,k] weight[(g i),k] norm[k]? delta[*,k]? post_norm[k]? bias[(g i)]? "
    "-> [*,i], [*,k]; k dot; k whole if norm delta; g whole"
)


def _linear_axes(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    axes = _AXES_WITH_GATE if attrs.get("gate") else _AXES
    return axes(operands, results, attrs)


_K, _N = 8, 6
_X, _V = TensorType("f32", (3, _K)), TensorType("f32", (_K,))


def _samples(allowed: tuple[str, ...], rows: int, **attrs: Any) -> Iterator[Sample]:
    """Every combination of the optional operands in `allowed`."""
    types = {"norm": _V, "delta": _X, "post_norm": _V, "bias": TensorType("f32", (rows,))}
    types["residual"] = TensorType("f32", (3, rows))
    for size in range(len(allowed) + 1):
        for names in combinations(allowed, size):
            if "post_norm" in names and "delta" not in names:
                continue
            eps = {"eps": 1e-6} if "norm" in names else {}
            post_eps = {"post_eps": 1e-5} if "post_norm" in names else {}
            named = {**{name: types[name] for name in names}, **eps, **post_eps, **attrs}
            yield Sample((_X, TensorType("f32", (rows, _K))), named)


linear = Op(
    "linear",
    _linear_infer,
    _linear_reference,
    _linear_cost,
    (
        *_samples(("bias",), 5),
        *_samples((*PROLOGUE, "bias", "residual"), _N),
        *_samples((*PROLOGUE, "bias"), 2 * _N, gate="silu"),
        *(s for gate in ACTIVATIONS for s in _samples((), 2 * _N, gate=gate)),
        *_samples(("norm", "bias"), 2 * _N, gate=CLAMPED, alpha=1.702, limit=7.0),
    ),
    axes=_linear_axes,
)


def is_plain(node: Node) -> bool:
    """Whether `node` is a linear with a bias at most: no prologue, residual or gate."""
    return node.op is linear and {*node.given} <= {"bias"} and not node.attrs


# ---- head_linear: each head's rows by that head's weight, x [T, H, K] · weightᵀ [H, K, N]


def _head_linear_infer(x: TensorType, weight: TensorType) -> Types:
    fits = x.rank == weight.rank == 3 and x.shape[1:] == (weight.shape[0], weight.shape[2])
    if not fits or x.dtype != weight.dtype or x.dtype not in FLOATS:
        raise VerifyError(
            f"head_linear: expected x [T, H, K] and weight [H, N, K] of one float dtype, "
            f"found {x} and {weight}"
        )
    return (x.with_shape((*x.shape[:2], weight.shape[1])),)


def _head_linear_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return product(x.transpose(0, 1), weight).transpose(0, 1)


def _product_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    flops = 2 * results[0].numel * operands["x"].shape[-1]
    return Cost(flops, moved(operands, results))


head_linear = Op(
    "head_linear",
    _head_linear_infer,
    _head_linear_reference,
    _product_cost,
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


def _matmul_reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return product(x, y.transpose(-1, -2))


matmul = Op(
    "matmul",
    _matmul_infer,
    _matmul_reference,
    _product_cost,
    (Sample((TensorType("f32", (2, 3, 4)), TensorType("f32", (2, 4, 5)))),),
    axes=batched_matmul,
)


def _embedding_infer(ids: TensorType, table: TensorType) -> Types:
    if ids.dtype not in ("i32", "i64") or table.rank != 2 or table.dtype not in FLOATS:
        raise VerifyError(
            f"embedding: expected integer ids and a table [V, D], found {ids}, {table}"
        )
    return (TensorType(table.dtype, (*ids.shape, table.shape[1])),)


embedding = Op(
    "embedding",
    _embedding_infer,
    torch.nn.functional.embedding,
    picked("ids"),
    (Sample((TensorType("i32", (3,)), TensorType("f32", (7, 4))), high=7),),
    axes=rule("ids[*] table[v,d] -> [*,d]; v by ids"),
)
