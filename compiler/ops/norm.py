"""Normalisations over the last dim."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Sample
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError

_X, _W = TensorType("f32", (3, 8)), TensorType("f32", (8,))


def _norm_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    return Cost(4 * args[0].numel, sum((t.nbytes for t in (*args, *results)), 0))


def _check(name: str, x: TensorType, *vectors: TensorType) -> Types:
    for v in vectors:
        if v.shape != x.shape[-1:] or v.dtype not in FLOATS:
            raise VerifyError(f"{name}: weight {v} must match the last dim of x {x}")
    if x.rank < 1 or x.dtype not in FLOATS:
        raise VerifyError(f"{name}: expected x [..., D] of a float dtype, found {x}")
    return (x,)


# ---- rms_norm: x / sqrt(mean(x²) + eps) · weight, in f32, rounded once to x's dtype
# (Zhang & Sennrich 2019, arXiv:1910.07467)


def _rms_norm_infer(x: TensorType, *weight: TensorType, eps: float) -> Types:
    if len(weight) > 1:
        raise VerifyError(f"rms_norm: expected x and at most one weight, found {len(weight)}")
    return _check("rms_norm", x, *weight)


def rms_normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """rms_norm of `x` in f32 (or f64), not yet rounded."""
    y = wide(x)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float
) -> tuple[torch.Tensor]:
    return (rms_normed(x, weight, eps).to(x.dtype),)


rms_norm = Op(
    "rms_norm",
    _rms_norm_infer,
    _rms_norm_reference,
    _norm_cost,
    (Sample((_X, _W), {"eps": 1e-6}), Sample((_X,), {"eps": 1e-5})),
    axes=rule("x[*,d] weight[d]? -> [*,d]; d whole"),
)


# ---- layer_norm (Ba et al. 2016, arXiv:1607.06450)


def _layer_norm_infer(x: TensorType, *affine: TensorType, eps: float) -> Types:
    if len(affine) > 2:
        raise VerifyError(f"layer_norm: expected x, weight and bias, found {1 + len(affine)}")
    return _check("layer_norm", x, *affine)


def _layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
) -> tuple[torch.Tensor]:
    y = torch.nn.functional.layer_norm(wide(x), x.shape[-1:], eps=eps)
    y = y if weight is None else y * weight
    return ((y if bias is None else y + bias).to(x.dtype),)


layer_norm = Op(
    "layer_norm",
    _layer_norm_infer,
    _layer_norm_reference,
    _norm_cost,
    (Sample((_X, _W, _W), {"eps": 1e-5}), Sample((_X, _W), {"eps": 1e-5})),
    axes=rule("x[*,d] weight[d]? bias[d]? -> [*,d]; d whole"),
)
