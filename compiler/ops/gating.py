"""The gate of a mixture of experts in one op: norm, router product, scores and choice."""

from __future__ import annotations

from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample, moved
from ..torch_types import torch_dtype
from ..types import TensorType, Types, VerifyError, dim
from .linear import product
from .moe import router
from .prologue import check_prologue, prologue_flops, run_prologue

# ---- moe_gating: x [T, K], weight [E, K] -> weights [T, k + S], indices [T, k + S], then n
# (experts need it too) if there is a norm, then s if there is a delta.
#
# router(logits, correction) of logits = n · weightᵀ + bias, n and s from the prologue. The operands
# of the product are brought to the dtype `logits` and it is rounded to that: a weight of another
# dtype stays in memory as it is. `eps` is the norm's; the router's is `sum_eps`.


def _gating_infer(
    x: TensorType,
    weight: TensorType,
    *,
    norm: TensorType | None = None,
    delta: TensorType | None = None,
    post_norm: TensorType | None = None,
    bias: TensorType | None = None,
    correction: TensorType | None = None,
    logits: str,
    sum_eps: float = 0.0,
    eps: float | None = None,
    post_eps: float | None = None,
    **routing: Any,
) -> Types:
    name = "moe_gating"
    sums = check_prologue(name, x, norm, delta, post_norm, eps, post_eps)
    fits = x.rank == 2 and weight.rank == 2 and x.shape[1] == weight.shape[1]
    if not fits or not {weight.dtype, logits} <= {*FLOATS}:
        raise VerifyError(
            f"{name}: expected x [T, K], a weight [E, K] and a float dtype of the logits, "
            f"found {x}, {weight} and {logits!r}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype not in FLOATS):
        raise VerifyError(f"{name}: expected a float bias [{weight.shape[0]}], found {bias}")
    scores = TensorType(logits, (x.shape[0], weight.shape[0]))
    try:
        given = {"correction": correction, "eps": sum_eps, **routing}
        chosen = router.types((scores,), given)
    except VerifyError as error:
        raise VerifyError(f"{name}: {error}") from error
    return (*chosen, *(() if norm is None else (x,)), *sums)


def _gating_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    post_norm: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logits: str,
    sum_eps: float = 0.0,
    eps: float | None = None,
    post_eps: float | None = None,
    **routing: Any,
) -> tuple[torch.Tensor, ...]:
    n, sums = run_prologue(x, norm, delta, post_norm, eps, post_eps)
    dtype = torch_dtype(logits)
    scores = product(n.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    chosen = router.reference(scores, eps=sum_eps, **routing)
    return (*chosen, *(() if norm is None else (n,)), *sums)


def _gating_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    x, weight = operands["x"], operands["weight"]
    flops: Any = 2 * x.shape[0] * weight.numel + 8 * x.shape[0] * weight.shape[0]
    flops += prologue_flops(operands)
    return Cost(dim(flops), moved(operands, results))


_X, _W, _K, _E = (TensorType("f32", shape) for shape in ((5, 8), (6, 8), (8,), (6,)))
_CHOICE = {"k": 2, "score": "softmax", "normalize": True, "dtype": "f32", "logits": "f32"}
# Where x is bf16, so is n, and weights of f32 are no better than it.
_NORMED = {**_CHOICE, "dtype": "bf16", "norm": _K, "eps": 1e-6}
_GROUPS = {"score": "sigmoid", "groups": 3, "topk_groups": 2, "group_score": "top2", "scale": 2.5}
_BIASES = {"bias": _E, "correction": _E, "sum_eps": 1e-20, "shared": 2}
moe_gating = Op(
    "moe_gating",
    _gating_infer,
    _gating_reference,
    _gating_cost,
    (
        Sample((_X, _W), _CHOICE),
        Sample((_X, _W), {**_NORMED, **_GROUPS, **_BIASES}),
        Sample((_X, _W), {**_NORMED, "delta": _X, "post_norm": _K, "post_eps": 1e-5}),
    ),
    axes=rule(
        "x[t,k] weight[e,k] norm[k]? delta[t,k]? post_norm[k]? bias[e]? correction[e]? "
        "-> [t,j], [t,j], [t,k], [t,k]; k dot; k whole if norm delta; e j whole"
    ),
)
