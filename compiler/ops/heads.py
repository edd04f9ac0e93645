"""Attention heads out of one product: bias, norm of each head and rotary embedding with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..axes import Axes, rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Sample
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError, dim
from .linear import product
from .norm import rms_normed
from .prologue import PROLOGUE, check_prologue, named_operands, prologue_flops, run_prologue
from .rope import rope

# What a part's norm is over: each head before RoPE (Qwen3), each head after it (HunYuan), or all
# heads of the part together, before RoPE (OLMo 2).
NORM_OF = ("head", "rotated head", "part")


def head_operands(parts: int) -> tuple[str, ...]:
    """The optional operands of project_heads, in order; norm_i is the norm weight of part i."""
    return (*PROLOGUE, "bias", *(f"norm_{i}" for i in range(parts)), "cos", "sin")


# ---- project_heads: x [T, K], weight [N, K] of the parts one after the other, part i of heads[i]
# heads of dims[i] -> [T, heads[i], dims[i]] for each part i, then s if there is a delta.
#
#   y     = n · weightᵀ + bias              n and s from the prologue (ops/prologue.py)
#   parts = y cut into parts, parts into heads
#   each part that has a norm_i is rms_norm'ed, each part with rotate[i] is turned by `rope`
# all in f32, each part rounded once.


def _heads_infer(
    x: TensorType,
    weight: TensorType,
    *operands: TensorType,
    heads: tuple[int, ...],
    dims: tuple[int, ...],
    optional: tuple[str, ...] = (),
    rotate: tuple[bool, ...] = (),
    form: str = "",
    start: int = 0,
    norm_of: str = "head",
    head_eps: float | None = None,
    eps: float | None = None,
    post_eps: float | None = None,
) -> Types:
    name = "project_heads"
    if not heads or len(heads) != len(dims) or min(*heads, *dims) < 1:
        raise VerifyError(f"{name}: expected heads and dims of each part, found {heads}, {dims}")
    given = named_operands(name, optional, head_operands(len(heads)), operands)
    sums = check_prologue(name, x, given, eps, post_eps)
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    if x.rank != 2 or weight != TensorType(x.dtype, (rows, x.shape[-1])):
        raise VerifyError(
            f"{name}: expected x [T, K] and a weight [{rows}, K] of its dtype, "
            f"found {x} and {weight}"
        )
    if "bias" in given and given["bias"] != TensorType(x.dtype, (rows,)):
        raise VerifyError(f"{name}: expected a bias [{rows}] of x's dtype, found {given['bias']}")
    results = tuple(x.with_shape((x.shape[0], h, d)) for h, d in zip(heads, dims, strict=True))
    _check_norms(results, given, norm_of, head_eps)
    _check_tables(results, given, rotate, form, start)
    return (*results, *sums)


def _check_norms(
    parts: Types, given: dict[str, TensorType], norm_of: str, head_eps: float | None
) -> None:
    norms = {i: given[key] for i in range(len(parts)) if (key := f"norm_{i}") in given}
    if norm_of not in NORM_OF or bool(norms) != (head_eps is not None):
        raise VerifyError(
            f"project_heads: expected norm_of one of {', '.join(NORM_OF)} and a head_eps where "
            f"parts have norms, found {norm_of!r}, {head_eps} and norms of parts {list(norms)}"
        )
    for i, weight in norms.items():
        _, heads, size = parts[i].shape
        width = dim(heads * size) if norm_of == "part" else size
        if weight.shape != (width,) or weight.dtype not in FLOATS:
            raise VerifyError(f"project_heads: expected norm_{i} [{width}], found {weight}")


def _check_tables(
    parts: Types, given: dict[str, TensorType], rotate: tuple[bool, ...], form: str, start: int
) -> None:
    tables = [given[key] for key in ("cos", "sin") if key in given]
    fits = len(rotate) == len(parts) and len(tables) == 2 if any(rotate) else not tables
    if not fits or any(rotate) != bool(form) or len(rotate) not in (0, len(parts)):
        found = ", ".join(map(str, tables)) or "none"
        raise VerifyError(
            f"project_heads: expected one `rotate` a part, and a form and tables where one is set, "
            f"found rotate {list(rotate)}, form {form!r}, tables {found}"
        )
    for part, turned in zip(parts, rotate, strict=False):
        try:
            if turned:
                rope.infer(part, *tables, form=form, start=start)
        except VerifyError as error:
            raise VerifyError(f"project_heads: {error}") from error


def _heads_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    *operands: torch.Tensor,
    heads: tuple[int, ...],
    dims: tuple[int, ...],
    optional: tuple[str, ...] = (),
    rotate: tuple[bool, ...] = (),
    form: str = "",
    start: int = 0,
    norm_of: str = "head",
    head_eps: float | None = None,
    eps: float | None = None,
    post_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    given = dict(zip(optional, operands, strict=True))
    n, sums = run_prologue(x, given, eps, post_eps)
    y = product(wide(n), weight, given.get("bias"))
    widths = [h * d for h, d in zip(heads, dims, strict=True)]
    results: list[torch.Tensor] = []
    for i, (columns, size) in enumerate(zip(y.split(widths, -1), dims, strict=True)):
        norms = {norm_of: given[f"norm_{i}"]} if f"norm_{i}" in given else {}
        part = _normed(columns, norms.get("part"), head_eps).unflatten(-1, (-1, size))
        part = _normed(part, norms.get("head"), head_eps)
        if rotate and rotate[i]:
            (part,) = rope.reference(part, given["cos"], given["sin"], form=form, start=start)
        results.append(_normed(part, norms.get("rotated head"), head_eps).to(x.dtype))
    return (*results, *sums)


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    return x if weight is None else rms_normed(x, weight, eps or 0.0)


def _heads_cost(args: Types, results: Types, **attrs: Any) -> Cost:
    """The product, and 4 a normed and 3 a turned element, as the ops for themselves."""
    x, weight = args[:2]
    optional, rotate = attrs.get("optional", ()), attrs.get("rotate", ())
    flops: Any = 2 * x.shape[0] * weight.numel + prologue_flops(x, optional)
    for i, part in enumerate(results[: len(attrs["heads"])]):
        normed, turned = f"norm_{i}" in optional, bool(rotate) and rotate[i]
        flops += (4 * normed + 3 * turned) * part.numel
    return Cost(dim(flops), sum((t.nbytes for t in (*args, *results)), 0))


def _heads_axes(args: Types, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """x[t,k] weight[n,k] … -> [t,h,d] of each part, then s [t,k]."""
    parts = range(len(attrs["heads"]))
    norms = " ".join(f"norm_{i}[w{i}]?" for i in parts)
    made = ", ".join((*(f"[t,h{i},d{i}]" for i in parts), "[t,k]"))
    own = " ".join(f"h{i} d{i} w{i}" for i in parts)
    return rule(
        f"x[t,k] weight[n,k] norm[k]? delta[t,k]? post_norm[k]? bias[n]? {norms} cos[t,r]? "
        f"sin[t,r]? -> {made}; k dot; k whole if norm delta; n r {own} whole"
    )(args, results, attrs)


_X, _W = TensorType("f32", (5, 8)), TensorType("f32", (24, 8))
_K, _D, _N, _TABLE = (TensorType("f32", s) for s in ((8,), (4,), (24,), (5, 2)))
_QKV = {"heads": (3, 2, 1), "dims": (4, 4, 4)}
_ROPE = {"rotate": (True, True, False), "form": "half"}
project_heads = Op(
    "project_heads",
    _heads_infer,
    _heads_reference,
    _heads_cost,
    (
        Sample((_X, _W, _TABLE, _TABLE), {**_QKV, "optional": ("cos", "sin"), **_ROPE}),
        Sample((_X, _W, _N), {**_QKV, "optional": ("bias",)}),
        Sample(
            (_X, _W, _K, _N, _D, _D, _TABLE, _TABLE),
            {
                **_QKV,
                "optional": ("norm", "bias", "norm_0", "norm_1", "cos", "sin"),
                **_ROPE,
                "form": "interleaved",
                "head_eps": 1e-6,
                "eps": 1e-5,
            },
        ),
        Sample(
            (_X, _W, _K, _X, _K, TensorType("f32", (12,)), TensorType("f32", (12,)))
            + (TensorType("f32", (5, 1)),) * 2,
            {
                "heads": (3, 2),
                "dims": (4, 6),
                "optional": ("norm", "delta", "post_norm", "norm_0", "norm_1", "cos", "sin"),
                "rotate": (False, True),
                "form": "deinterleaved",
                "start": 4,
                "norm_of": "part",
                "head_eps": 1e-6,
                "eps": 1e-5,
                "post_eps": 1e-6,
            },
        ),
        Sample(
            (_X, _W, _D, _TABLE, _TABLE),
            {
                "heads": (6,),
                "dims": (4,),
                "optional": ("norm_0", "cos", "sin"),
                "rotate": (True,),
                "form": "half",
                "norm_of": "rotated head",
                "head_eps": 1e-6,
            },
        ),
    ),
    axes=_heads_axes,
)
