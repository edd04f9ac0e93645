"""Products with what stands before and after them: norm, residual sum, bias, activation.

Each op equals the chain of ops that it stands for, with fewer roundings: its result, s and n (see
`prologue`) are rounded, nothing else is.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch

from ..axes import rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Sample
from ..torch_types import wide
from ..types import Dim, TensorType, Types, VerifyError
from .collective import Communicator, check_ranks, summed
from .glu import ACTIVATIONS, CLAMPED, check_activation, gated
from .linear import product
from .prologue import PROLOGUE, check_prologue, named_operands, prologue_flops, run_prologue

LINEAR_OPTIONS = (*PROLOGUE, "bias", "residual")
GATED_OPTIONS = (*PROLOGUE, "bias")


def _check_weight(
    name: str, x: TensorType, weight: TensorType, bias: TensorType | None, rows: str
) -> None:
    fits = x.rank >= 1 and weight.rank == 2 and x.shape[-1] == weight.shape[1]
    if not fits or x.dtype != weight.dtype or x.dtype not in FLOATS:
        raise VerifyError(
            f"{name}: expected x [..., K] and weight [{rows}, K] of one float dtype, "
            f"found {x} and {weight}"
        )
    if bias is not None and bias != TensorType(x.dtype, weight.shape[:1]):
        size = weight.shape[0]
        raise VerifyError(f"{name}: expected a bias [{size}] of x's dtype, found {bias}")


def _moved(args: Types, results: Types) -> Dim:
    return sum((t.nbytes for t in (*args, *results)), 0)


def _multiplied(n: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """n · weightᵀ (+ bias), not yet rounded."""
    rows = wide(n).reshape(-1, n.shape[-1])
    return product(rows, wide(weight), bias).view(*n.shape[:-1], weight.shape[0])


# What samples exercise: every combination of the optional operands that an op allows.
_K, _N = 8, 6
_X, _V = TensorType("f32", (3, _K)), TensorType("f32", (_K,))
_PROLOGUE_TYPES = {"norm": _V, "delta": _X, "post_norm": _V}


def _samples(
    allowed: tuple[str, ...], rows: int, types: dict[str, TensorType], **attrs: Any
) -> tuple[Sample, ...]:
    types = {**_PROLOGUE_TYPES, "bias": TensorType("f32", (rows,)), **types}
    sizes = range(len(allowed) + 1)
    samples: list[Sample] = []
    for optional in (names for size in sizes for names in combinations(allowed, size)):
        if "post_norm" in optional and "delta" not in optional:
            continue
        eps = {"eps": 1e-6} if "norm" in optional else {}
        post_eps = {"post_eps": 1e-5} if "post_norm" in optional else {}
        args = (_X, TensorType("f32", (rows, _K)), *(types[name] for name in optional))
        samples.append(Sample(args, {"optional": optional, **eps, **post_eps, **attrs}))
    return tuple(samples)


# ---- fused_linear: n · weightᵀ + bias + residual, and s if there is a delta.
# x [..., K], weight [N, K], bias [N], residual [..., N].


def _linear_infer(
    x: TensorType,
    weight: TensorType,
    *operands: TensorType,
    optional: tuple[str, ...] = (),
    eps: float | None = None,
    post_eps: float | None = None,
) -> Types:
    named = named_operands("fused_linear", optional, LINEAR_OPTIONS, operands)
    _check_weight("fused_linear", x, weight, named.get("bias"), "N")
    sums = check_prologue("fused_linear", x, named, eps, post_eps)
    result = x.with_shape((*x.shape[:-1], weight.shape[0]))
    if (residual := named.get("residual", result)) != result:
        raise VerifyError(f"fused_linear: expected a residual {result}, found {residual}")
    return (result, *sums)


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *operands: torch.Tensor,
    optional: tuple[str, ...] = (),
    eps: float | None = None,
    post_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    named = dict(zip(optional, operands, strict=True))
    n, sums = run_prologue(x, named, eps, post_eps)
    y = _multiplied(n, weight, named.get("bias"))
    if (residual := named.get("residual")) is not None:
        y = y + wide(residual)
    return (y.to(x.dtype), *sums)


def _linear_cost(
    args: Types, results: Types, *, optional: tuple[str, ...] = (), **attrs: Any
) -> Cost:
    product_flops = 2 * results[0].numel * args[1].shape[1]
    epilogue = results[0].numel if "residual" in optional else 0
    flops = product_flops + epilogue + prologue_flops(args[0], optional)
    return Cost(flops, _moved(args, results))


fused_linear = Op(
    "fused_linear",
    _linear_infer,
    _linear_reference,
    _linear_cost,
    _samples(LINEAR_OPTIONS, _N, {"residual": TensorType("f32", (3, _N))}),
    axes=rule(
        "x[*,k] weight[n,k] norm[k]? delta[*,k]? post_norm[k]? +bias[n]? +residual[*,n]? "
        "-> [*,n], [*,k]; k sum; k whole if norm delta"
    ),
)


# ---- gated_linear: activation(gate) · up (see `glu`), where n · weightᵀ + bias is gate ‖ up, and s
# if there is a delta. x [..., K], weight [2I, K] (gate rows, then up rows), bias [2I] -> [..., I].


def _gated_infer(
    x: TensorType,
    weight: TensorType,
    *operands: TensorType,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
    optional: tuple[str, ...] = (),
    eps: float | None = None,
    post_eps: float | None = None,
) -> Types:
    named = named_operands("gated_linear", optional, GATED_OPTIONS, operands)
    _check_weight("gated_linear", x, weight, named.get("bias"), "2I")
    check_activation("gated_linear", activation, alpha, limit)
    sums = check_prologue("gated_linear", x, named, eps, post_eps)
    rows: Any = weight.shape[0]
    if not isinstance(rows, int) or rows % 2:
        raise VerifyError(
            f"gated_linear: expected as many gate rows as up rows, found a weight {weight}"
        )
    return (x.with_shape((*x.shape[:-1], rows // 2)), *sums)


def _gated_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *operands: torch.Tensor,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
    optional: tuple[str, ...] = (),
    eps: float | None = None,
    post_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    named = dict(zip(optional, operands, strict=True))
    n, sums = run_prologue(x, named, eps, post_eps)
    gate, up = _multiplied(n, weight, named.get("bias")).chunk(2, -1)
    return (gated(gate, up, activation, alpha, limit).to(x.dtype), *sums)


def _gated_cost(
    args: Types, results: Types, *, optional: tuple[str, ...] = (), **attrs: Any
) -> Cost:
    product_flops = 4 * results[0].numel * args[1].shape[1]
    flops = product_flops + 5 * results[0].numel + prologue_flops(args[0], optional)
    return Cost(flops, _moved(args, results))


gated_linear = Op(
    "gated_linear",
    _gated_infer,
    _gated_reference,
    _gated_cost,
    (
        *_samples(GATED_OPTIONS, 2 * _N, {}, activation="silu"),
        *(Sample((_X, TensorType("f32", (2 * _N, _K))), {"activation": a}) for a in ACTIVATIONS),
        *_samples(("norm", "bias"), 2 * _N, {}, activation=CLAMPED, alpha=1.702, limit=7.0),
    ),
    axes=rule(
        "x[*,k] weight[(g i),k] norm[k]? delta[*,k]? post_norm[k]? bias[(g i)]? "
        "-> [*,i], [*,k]; k dot; k whole if norm delta; g whole"
    ),
)


# ---- add_rms_norm: x + delta, and its rms_norm. With several `ranks`, delta is first summed over
# them (see `collective`): an all_reduce with the sum and the norm behind it.


def _add_norm_infer(
    x: TensorType, delta: TensorType, weight: TensorType, *, eps: float, ranks: int = 1
) -> Types:
    check_ranks("add_rms_norm", ranks)
    check_prologue("add_rms_norm", x, {"norm": weight, "delta": delta}, eps, None)
    return (x, x)


def _add_norm_reference(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    ranks: int = 1,
    communicator: Communicator | None = None,
) -> tuple[torch.Tensor, ...]:
    if ranks > 1:
        delta = summed(delta, ranks, communicator)
    n, (total,) = run_prologue(x, {"norm": weight, "delta": delta}, eps, None)
    return (total, n)


def _add_norm_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    return Cost(prologue_flops(args[0], ("norm", "delta")), _moved(args, results))


add_rms_norm = Op(
    "add_rms_norm",
    _add_norm_infer,
    _add_norm_reference,
    _add_norm_cost,
    (Sample((_X, _X, _V), {"eps": 1e-6}),),
    collective=True,
    axes=rule("x[*,k] delta[*,k] weight[k] -> [*,k], [*,k]; k whole"),
)
