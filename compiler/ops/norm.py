"""Normalisations over the last dim."""

from __future__ import annotations

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Op, Sample, per_element
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError

_X, _W = TensorType("f32", (3, 8)), TensorType("f32", (8,))


def _check(name: str, x: TensorType, *vectors: TensorType | None) -> Types:
    for v in vectors:
        if v is None:
            continue
        if v.shape != x.shape[-1:] or v.dtype not in FLOATS:
            raise VerifyError(f"{name}: weight {v} must match the last dim of x {x}")
    if x.rank < 1 or x.dtype not in FLOATS:
        raise VerifyError(f"{name}: expected x [..., D] of a float dtype, found {x}")
    return (x,)


# ---- rms_norm: x / sqrt(mean(x²) + eps) · weight, in f32, rounded once to x's dtype
# (Zhang & Sennrich 2019, arXiv:1910.07467)


def _rms_norm_infer(x: TensorType, *, weight: TensorType | None = None, eps: float) -> Types:
    return _check("rms_norm", x, weight)


def rms_normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """rms_norm of `x` in f32 (or f64), not yet rounded."""
    y = wide(x)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _rms_norm_reference(
    x: torch.Tensor, *, weight: torch.Tensor | None = None, eps: float
) -> torch.Tensor:
    return rms_normed(x, weight, eps).to(x.dtype)


rms_norm = Op(
    "rms_norm",
    _rms_norm_infer,
    _rms_norm_reference,
    per_element(4),
    (Sample((_X,), {"weight": _W, "eps": 1e-6}), Sample((_X,), {"eps": 1e-5})),
    axes=rule("x[*,d] weight[d]? -> [*,d]; d whole"),
)


# ---- layer_norm (Ba et al. 2016, arXiv:1607.06450)


def _layer_norm_infer(
    x: TensorType,
    *,
    weight: TensorType | None = None,
    bias: TensorType | None = None,
    eps: float,
) -> Types:
    return _check("layer_norm", x, weight, bias)


def _layer_norm_reference(
    x: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float,
) -> torch.Tensor:
    y = torch.nn.functional.layer_norm(wide(x), x.shape[-1:], eps=eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


layer_norm = Op(
    "layer_norm",
    _layer_norm_infer,
    _layer_norm_reference,
    per_element(4),
    (
        Sample((_X,), {"weight": _W, "bias": _W, "eps": 1e-5}),
        Sample((_X,), {"weight": _W, "eps": 1e-5}),
    ),
    axes=rule("x[*,d] weight[d]? bias[d]? -> [*,d]; d whole"),
)
