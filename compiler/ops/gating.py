"""The gate of a mixture of experts in one op: norm, router product, scores and choice."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Sample
from ..torch_types import torch_dtype
from ..types import TensorType, Types, VerifyError, dim
from .linear import product
from .moe import router
from .prologue import PROLOGUE, check_prologue, named_operands, prologue_flops, run_prologue

GATING_OPERANDS = (*PROLOGUE, "bias", "correction")


# ---- moe_gating: x [T, K], weight [E, K] -> weights [T, k + S], indices [T, k + S], then n
# (experts need it too) if there is a norm, then s if there is a delta.
#
# router(logits, correction) of logits = n · weightᵀ + bias, n and s from the prologue. The operands
# of the product are brought to the dtype `logits` and it is rounded to that: a weight of another
# dtype stays in memory as it is. `eps` is the norm's; the router's is `sum_eps`.


def _gating_infer(
    x: TensorType,
    weight: TensorType,
    *operands: TensorType,
    logits: str,
    optional: tuple[str, ...] = (),
    sum_eps: float = 0.0,
    eps: float | None = None,
    post_eps: float | None = None,
    **routing: Any,
) -> Types:
    name = "moe_gating"
    given = named_operands(name, optional, GATING_OPERANDS, operands)
    sums = check_prologue(name, x, given, eps, post_eps)
    fits = x.rank == 2 and weight.rank == 2 and x.shape[1] == weight.shape[1]
    if not fits or not {weight.dtype, logits} <= {*FLOATS}:
        raise VerifyError(
            f"{name}: expected x [T, K], a weight [E, K] and a float dtype of the logits, "
            f"found {x}, {weight} and {logits!r}"
        )
    bias = given.get("bias")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOATS):
        raise VerifyError(f"{name}: expected a float bias [{weight.shape[0]}], found {bias}")
    scores = TensorType(logits, (x.shape[0], weight.shape[0]))
    correction = (given["correction"],) if "correction" in given else ()
    try:
        chosen = router.infer(scores, *correction, eps=sum_eps, **routing)
    except VerifyError as error:
        raise VerifyError(f"{name}: {error}") from error
    return (*chosen, *((x,) if "norm" in given else ()), *sums)


def _gating_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *operands: torch.Tensor,
    logits: str,
    optional: tuple[str, ...] = (),
    sum_eps: float = 0.0,
    eps: float | None = None,
    post_eps: float | None = None,
    **routing: Any,
) -> tuple[torch.Tensor, ...]:
    given = dict(zip(optional, operands, strict=True))
    n, sums = run_prologue(x, given, eps, post_eps)
    dtype, bias = torch_dtype(logits), given.get("bias")
    scores = product(n.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    correction = (given["correction"],) if "correction" in given else ()
    chosen = router.reference(scores, *correction, eps=sum_eps, **routing)
    return (*chosen, *((n,) if "norm" in given else ()), *sums)


def _gating_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    x, weight = args[:2]
    flops: Any = 2 * x.shape[0] * weight.numel + 8 * x.shape[0] * weight.shape[0]
    flops += prologue_flops(x, attrs.get("optional", ()))
    return Cost(dim(flops), sum((t.nbytes for t in (*args, *results)), 0))


_X, _W, _K, _E = (TensorType("f32", shape) for shape in ((5, 8), (6, 8), (8,), (6,)))
_CHOICE = {"k": 2, "score": "softmax", "normalize": True, "dtype": "f32", "logits": "f32"}
# Where x is bf16, so is n, and weights of f32 are no better than it.
_ROUNDED = {**_CHOICE, "dtype": "bf16"}
moe_gating = Op(
    "moe_gating",
    _gating_infer,
    _gating_reference,
    _gating_cost,
    (
        Sample((_X, _W), _CHOICE),
        Sample(
            (_X, _W, _K, _E, _E),
            {
                **_ROUNDED,
                "score": "sigmoid",
                "groups": 3,
                "topk_groups": 2,
                "group_score": "top2",
                "scale": 2.5,
                "sum_eps": 1e-20,
                "shared": 2,
                "optional": ("norm", "bias", "correction"),
                "eps": 1e-6,
            },
        ),
        Sample(
            (_X, _W, _K, _X, _K),
            {
                **_ROUNDED,
                "optional": ("norm", "delta", "post_norm"),
                "eps": 1e-5,
                "post_eps": 1e-6,
            },
        ),
    ),
    axes=rule(
        "x[t,k] weight[e,k] norm[k]? delta[t,k]? post_norm[k]? bias[e]? correction[e]? "
        "-> [t,j], [t,j], [t,k], [t,k]; k dot; k whole if norm delta; e j whole"
    ),
)
