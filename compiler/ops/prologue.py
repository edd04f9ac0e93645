"""What products do to their input first: residual sum and norm, shared by every op that has them.

An op with a prologue takes x, its weight, and optional operands in a canonical order, which its
attribute `optional` names. Of these three are the prologue's:

    s = x, or with `delta`: x + delta, or with `post_norm`: x + rms_norm(delta, post_norm, post_eps)
    n = s, or with `norm`: rms_norm(s, norm, eps)

The op multiplies n by its weight. With `delta` it also returns s, as its last result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from ..dtypes import FLOATS
from ..torch_types import wide
from ..types import Dim, TensorType, Types, VerifyError
from .norm import rms_normed

PROLOGUE = ("norm", "delta", "post_norm")

_T = TypeVar("_T")


def named_operands(
    name: str, optional: tuple[str, ...], allowed: Sequence[str], operands: Sequence[_T]
) -> dict[str, _T]:
    """The operands that op `name` takes after its weight, by the names in `optional`.

    VerifyError unless `optional` is a part of `allowed`, in its order, with an operand a name.
    """
    if optional != tuple(n for n in allowed if n in optional):
        known = ", ".join(allowed)
        raise VerifyError(f"{name}: optional is of {known} in this order; found {list(optional)}")
    if len(optional) != len(operands):
        found = ", ".join(map(str, operands)) or "none"
        raise VerifyError(
            f"{name}: expected an operand for each of {list(optional)}, found {found}"
        )
    return dict(zip(optional, operands, strict=True))


def check_prologue(
    name: str,
    x: TensorType,
    operands: Mapping[str, TensorType],
    eps: float | None,
    post_eps: float | None,
) -> Types:
    """The types of the results that the prologue adds: s, if there is a `delta`.

    VerifyError where its operands do not fit x or each other. An eps belongs to each norm, and None
    to a norm that is not there.
    """
    if x.rank < 1 or x.dtype not in FLOATS:
        raise VerifyError(f"{name}: expected x [..., K] of a float dtype, found {x}")
    for key, given in (("norm", eps), ("post_norm", post_eps)):
        if (key in operands) != (given is not None):
            has = "with" if key in operands else "without"
            raise VerifyError(f"{name}: found eps {given} for an op {has} {key}")
        weight = operands.get(key)
        if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype not in FLOATS):
            raise VerifyError(f"{name}: {key} {weight} must match the last dim of x {x}")
    delta = operands.get("delta")
    if delta is None and "post_norm" in operands:
        raise VerifyError(f"{name}: expected a delta for post_norm, found none")
    if delta is not None and delta != x:
        raise VerifyError(f"{name}: expected a delta of x's type {x}, found {delta}")
    return () if delta is None else (x,)


def run_prologue(
    x: torch.Tensor,
    operands: Mapping[str, torch.Tensor],
    eps: float | None,
    post_eps: float | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """n, which the product takes, and (s,) if there is a `delta`; both in x's dtype.

    s is rounded before the norm reads it: others read the same s.
    """
    s = x
    if (delta := operands.get("delta")) is not None:
        post = operands.get("post_norm")
        delta = wide(delta) if post is None else rms_normed(delta, post, post_eps or 0.0)
        s = (wide(x) + delta).to(x.dtype)
    norm = operands.get("norm")
    n = s if norm is None else rms_normed(s, norm, eps or 0.0).to(x.dtype)
    return n, () if operands.get("delta") is None else (s,)


def prologue_flops(x: TensorType, optional: tuple[str, ...]) -> Dim:
    """What the prologue adds to an op's flops: as its norms and its sum alone would cost."""
    per_element = {"norm": 4, "delta": 1, "post_norm": 4}
    count: Any = sum(per_element.get(name, 0) for name in optional)
    return count * x.numel
