"""What products do to their input first: residual sum and norm, shared by every op that has them.

An op with a prologue takes x and its weight, and of its optional operands three are the prologue's:

    s = x, or with `delta`: x + delta, or with `post_norm`: x + rms_norm(delta, post_norm, post_eps)
    n = s, or with `norm`: rms_norm(s, norm, eps)

The op multiplies n by its weight. With `delta` it also returns s, as its last result.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dtypes import FLOATS
from ..ir import Operands
from ..torch_types import wide
from ..types import Dim, TensorType, Types, VerifyError
from .norm import rms_normed

PROLOGUE = ("norm", "delta", "post_norm")


def check_prologue(
    name: str,
    x: TensorType,
    norm: TensorType | None,
    delta: TensorType | None,
    post_norm: TensorType | None,
    eps: float | None,
    post_eps: float | None,
) -> Types:
    """The types of the results that the prologue adds: s, if there is a `delta`.

    VerifyError where its operands do not fit x or each other. An eps belongs to each norm, and None
    to a norm that is not there.
    """
    if x.rank < 1 or x.dtype not in FLOATS:
        raise VerifyError(f"{name}: expected x [..., K] of a float dtype, found {x}")
    for key, weight, given in (("norm", norm, eps), ("post_norm", post_norm, post_eps)):
        if (weight is None) != (given is None):
            has = "without" if weight is None else "with"
            raise VerifyError(f"{name}: found eps {given} for an op {has} {key}")
        if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype not in FLOATS):
            raise VerifyError(f"{name}: {key} {weight} must match the last dim of x {x}")
    if delta is None and post_norm is not None:
        raise VerifyError(f"{name}: expected a delta for post_norm, found none")
    if delta is not None and delta != x:
        raise VerifyError(f"{name}: expected a delta of x's type {x}, found {delta}")
    return () if delta is None else (x,)


def run_prologue(
    x: torch.Tensor,
    norm: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    post_norm: torch.Tensor | None = None,
    eps: float | None = None,
    post_eps: float | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """n, which the product takes, and (s,) if there is a `delta`; both in x's dtype.

    s is rounded before the norm reads it: others read the same s.
    """
    s = x
    if delta is not None:
        added = wide(delta) if post_norm is None else rms_normed(delta, post_norm, post_eps or 0.0)
        s = (wide(x) + added).to(x.dtype)
    n = s if norm is None else rms_normed(s, norm, eps or 0.0).to(x.dtype)
    return n, () if delta is None else (s,)


def prologue_flops(operands: Operands) -> Dim:
    """What the prologue adds to an op's flops: as its norms and its sum alone would cost."""
    per_element = {"norm": 4, "delta": 1, "post_norm": 4}
    count: Any = sum(per_element.get(name, 0) for name in operands)
    return count * operands["x"].numel
