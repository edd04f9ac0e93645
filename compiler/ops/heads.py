"""Attention heads out of one product: bias, norm of each head and rotary embedding with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..axes import Axes, rule
from ..dtypes import FLOATS
from ..ir import Cost, Op, Operands, Sample, moved
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError, dim
from .attention import append_rows, kv_append, without_caches
from .linear import product
from .norm import rms_normed
from .prologue import check_prologue, prologue_flops, run_prologue
from .rope import rope

# What a part's norm is over: each head before RoPE (Qwen3), each head after it (HunYuan), or all
# heads of the part together, before RoPE (OLMo 2).
NORM_OF = ("head", "rotated head", "part")

_CACHES = ("cache_0", "cache_1", "cache_2")

# ---- project_heads: x [T, K], weight [N, K] of one to three parts one after the other, part i of
# heads[i] heads of dims[i] -> [T, heads[i], dims[i]] for each part i, then s if there is a delta.
#
#   y     = n · weightᵀ + bias              n and s from the prologue (ops/prologue.py)
#   parts = y cut into parts, parts into heads
#   each part that has a weight norm_i is rms_norm'ed, each part with rotate[i] is turned by `rope`
# all in f32, each part rounded once. Parts that have a cache_i are appended to it, as by kv_append;
# the new caches are the last results.


def _heads_infer(
    x: TensorType,
    weight: TensorType,
    *,
    norm: TensorType | None = None,
    delta: TensorType | None = None,
    post_norm: TensorType | None = None,
    bias: TensorType | None = None,
    norm_0: TensorType | None = None,
    norm_1: TensorType | None = None,
    norm_2: TensorType | None = None,
    cos: TensorType | None = None,
    sin: TensorType | None = None,
    cache_0: TensorType | None = None,
    cache_1: TensorType | None = None,
    cache_2: TensorType | None = None,
    slots: TensorType | None = None,
    positions: TensorType | None = None,
    page_table: TensorType | None = None,
    heads: tuple[int, ...],
    dims: tuple[int, ...],
    rotate: tuple[bool, ...] = (),
    form: str = "",
    start: int = 0,
    norm_of: str = "head",
    head_eps: float | None = None,
    eps: float | None = None,
    post_eps: float | None = None,
) -> Types:
    name = "project_heads"
    if not 1 <= len(heads) == len(dims) <= 3 or min(*heads, *dims) < 1:
        raise VerifyError(
            f"{name}: expected heads and dims of each of one to three parts, found {heads}, {dims}"
        )
    sums = check_prologue(name, x, norm, delta, post_norm, eps, post_eps)
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    if x.rank != 2 or weight != TensorType(x.dtype, (rows, x.shape[-1])):
        raise VerifyError(
            f"{name}: expected x [T, K] and a weight [{rows}, K] of its dtype, "
            f"found {x} and {weight}"
        )
    if bias is not None and bias != TensorType(x.dtype, (rows,)):
        raise VerifyError(f"{name}: expected a bias [{rows}] of x's dtype, found {bias}")
    results = tuple(x.with_shape((x.shape[0], h, d)) for h, d in zip(heads, dims, strict=True))
    _check_norms(results, (norm_0, norm_1, norm_2), norm_of, head_eps)
    _check_tables(results, [t for t in (cos, sin) if t is not None], rotate, form, start)
    index = (slots, positions, page_table)
    caches = append_rows(kv_append.infer, results, (cache_0, cache_1, cache_2), index)
    return (*results, *sums, *caches)


def _check_norms(
    parts: Types, given: tuple[TensorType | None, ...], norm_of: str, head_eps: float | None
) -> None:
    norms = {i: weight for i, weight in enumerate(given) if weight is not None}
    fits = bool(norms) == (head_eps is not None) and norms.keys() <= {*range(len(parts))}
    if norm_of not in NORM_OF or not fits:
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
    parts: Types, tables: list[TensorType], rotate: tuple[bool, ...], form: str, start: int
) -> None:
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
    *,
    norm: torch.Tensor | None = None,
    delta: torch.Tensor | None = None,
    post_norm: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    norm_0: torch.Tensor | None = None,
    norm_1: torch.Tensor | None = None,
    norm_2: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    cache_0: torch.Tensor | None = None,
    cache_1: torch.Tensor | None = None,
    cache_2: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    heads: tuple[int, ...],
    dims: tuple[int, ...],
    rotate: tuple[bool, ...] = (),
    form: str = "",
    start: int = 0,
    norm_of: str = "head",
    head_eps: float | None = None,
    eps: float | None = None,
    post_eps: float | None = None,
) -> tuple[torch.Tensor, ...]:
    n, sums = run_prologue(x, norm, delta, post_norm, eps, post_eps)
    y = product(wide(n), weight, bias)
    norms = (norm_0, norm_1, norm_2)
    widths = [h * d for h, d in zip(heads, dims, strict=True)]
    results: list[torch.Tensor] = []
    for i, (columns, size) in enumerate(zip(y.split(widths, -1), dims, strict=True)):
        by = {norm_of: norms[i]}
        part = _normed(columns, by.get("part"), head_eps).unflatten(-1, (-1, size))
        part = _normed(part, by.get("head"), head_eps)
        if rotate and rotate[i]:
            (part,) = rope.reference(part, cos, sin, form=form, start=start)
        results.append(_normed(part, by.get("rotated head"), head_eps).to(x.dtype))
    index = (slots, positions, page_table)
    caches = append_rows(kv_append.reference, results, (cache_0, cache_1, cache_2), index)
    return (*results, *sums, *caches)


def _normed(x: torch.Tensor, weight: torch.Tensor | None, eps: float | None) -> torch.Tensor:
    return x if weight is None else rms_normed(x, weight, eps or 0.0)


def _heads_cost(operands: Operands, results: Types, **attrs: Any) -> Cost:
    """The product, and 4 a normed and 3 a turned element, as the ops for themselves.

    Of caches it writes the rows, which count as results, alone.
    """
    operands, results = without_caches(operands, results, _CACHES)
    rotate = attrs.get("rotate", ())
    flops: Any = 2 * operands["x"].shape[0] * operands["weight"].numel + prologue_flops(operands)
    for i, part in enumerate(results[: len(attrs["heads"])]):
        normed, turned = f"norm_{i}" in operands, bool(rotate) and rotate[i]
        flops += (4 * normed + 3 * turned) * part.numel
    return Cost(dim(flops), moved(operands, results))


def _heads_axes(operands: Operands, results: Types, attrs: Mapping[str, Any]) -> Axes:
    """x[t,k] weight[n,k] … -> [t,h,d] of each part, then s [t,k]."""
    parts = range(len(attrs["heads"]))
    norms = " ".join(f"norm_{i}[w{i}]?" for i in parts)
    cached = [i for i, name in enumerate(_CACHES) if name in operands]
    caches = " ".join(f"cache_{i}[p,z,g{i},e{i}]?" for i in cached)
    sums = ("[t,k]",) if "delta" in operands else ()
    made = ", ".join(
        (*(f"[t,h{i},d{i}]" for i in parts), *sums, *(f"[p,z,g{i},e{i}]" for i in cached))
    )
    own = " ".join((*(f"h{i} d{i} w{i}" for i in parts), *(f"g{i} e{i}" for i in cached)))
    return rule(
        f"x[t,k] weight[n,k] norm[k]? delta[t,k]? post_norm[k]? bias[n]? {norms} cos[t,r]? "
        f"sin[t,r]? {caches} slots[t]? positions[t]? page_table[a,b]? -> {made}; "
        f"k dot; k whole if norm delta; n r {own} p z a b whole; t whole if slots"
    )(operands, results, attrs)


_X, _W = TensorType("f32", (5, 8)), TensorType("f32", (24, 8))
_K, _D, _N, _TABLE = (TensorType("f32", s) for s in ((8,), (4,), (24,), (5, 2)))
_QKV = {"heads": (3, 2, 1), "dims": (4, 4, 4)}
_NORM = {"norm": _K, "eps": 1e-5}
_NORMS = {"norm_0": _D, "norm_1": _D, "head_eps": 1e-6}
_ROPE = {"cos": _TABLE, "sin": _TABLE, "rotate": (True, True, False), "form": "half"}
# Two parts, normed as wholes; of the heads of the second the last two of six dims are turned.
_PARTS = {"heads": (3, 2), "dims": (4, 6), "rotate": (False, True), "start": 4, "norm_of": "part"}
_WIDE_NORMS = {f"norm_{i}": TensorType("f32", (12,)) for i in range(2)}
_NARROW = {name: TensorType("f32", (5, 1)) for name in ("cos", "sin")}
_SUM = {"delta": _X, "post_norm": _K, "post_eps": 1e-6, "head_eps": 1e-6, "form": "deinterleaved"}
_ONE = {"heads": (6,), "dims": (4,), "norm_0": _D, "head_eps": 1e-6, "norm_of": "rotated head"}
project_heads = Op(
    "project_heads",
    _heads_infer,
    _heads_reference,
    _heads_cost,
    (
        Sample((_X, _W), {**_QKV, **_ROPE}),
        Sample((_X, _W), {**_QKV, "bias": _N}),
        Sample((_X, _W), {**_QKV, **_ROPE, **_NORM, **_NORMS, "bias": _N, "form": "interleaved"}),
        Sample((_X, _W), {**_PARTS, **_NORM, **_SUM, **_WIDE_NORMS, **_NARROW}),
        Sample((_X, _W), {**_ONE, **_ROPE, "rotate": (True,)}),
    ),
    caches=_CACHES,
    axes=_heads_axes,
)
