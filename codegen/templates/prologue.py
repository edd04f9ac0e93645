"""What products do to their input first (see compiler.ops.prologue), one program a row."""

from __future__ import annotations

import triton
import triton.language as tl

from ...compiler.types import TensorType
from ..request import Arg, Call, Declined, Ref, Request, Temp

# A row is held in registers whole; more elements than this do not fit.
_LONGEST = 32768


@triton.jit
def prologue_kernel(
    x,
    delta,
    post_norm,
    norm,
    s_out,
    n_out,
    K: tl.constexpr,
    X_STEP: tl.constexpr,
    DELTA_STEP: tl.constexpr,
    EPS: tl.constexpr,
    POST_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """s = x + delta (normed by post_norm) and n = rms_norm(s, norm); None is left out."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < K
    total = tl.load(x + row * X_STEP + at, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        added = tl.load(delta + row * DELTA_STEP + at, mask=inside, other=0.0).to(tl.float32)
        if post_norm is not None:
            added = added * tl.rsqrt(tl.sum(added * added, 0) / K + POST_EPS)
            added = added * tl.load(post_norm + at, mask=inside, other=0.0).to(tl.float32)
        rounded = (total + added).to(s_out.dtype.element_ty)
        tl.store(s_out + row * K + at, rounded, mask=inside)
        total = rounded.to(tl.float32)
    if norm is not None:
        total = total * tl.rsqrt(tl.sum(total * total, 0) / K + EPS)
        total = total * tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(n_out + row * K + at, total.to(n_out.dtype.element_ty), mask=inside)


def prologue_call(
    request: Request, named: dict[str, int], s: Ref | None, n: Ref | None
) -> Call | Declined:
    """The launch that computes an op's prologue from argument 0 and those in `named`.

    `s` is where the sum goes (None without a delta), `n` where the normed rows go (None without a
    norm).
    """
    x = request.args[0]
    k = x.shape[-1]
    operands = [x, *(request.args[named[name]] for name in ("delta",) if name in named)]
    if any(o.strides[-1] != 1 or len(o.shape) != 2 for o in operands):
        return Declined("the rows of x or delta are not dense")
    if k > _LONGEST:
        return Declined(f"rows of {k} elements, expected at most {_LONGEST}")
    block = triton.next_power_of_2(k)
    args: dict[str, Ref | int | float] = {"x": Arg(0)}
    constants: dict[str, object] = {
        "K": k,
        "X_STEP": x.strides[0],
        "DELTA_STEP": request.args[named["delta"]].strides[0] if "delta" in named else 0,
        "EPS": request.attrs.get("eps") or 0.0,
        "POST_EPS": request.attrs.get("post_eps") or 0.0,
        "BLOCK": block,
    }
    places = {name: Arg(named[name]) for name in ("delta", "post_norm", "norm") if name in named}
    for name in ("delta", "post_norm", "norm"):
        (args if name in places else constants)[name] = places.get(name)
    for name, ref in (("s_out", s), ("n_out", n)):
        (constants if ref is None else args)[name] = ref
    writes = tuple(ref for ref in (s, n) if ref is not None)
    warps = max(1, min(16, block // 1024))
    return Call(prologue_kernel, args, (x.shape[0], 1, 1), writes, constants, num_warps=warps)


def normed_input(
    request: Request, named: dict[str, int], s: Ref | None
) -> tuple[list[Call], Ref, int, dict[str, TensorType]] | Declined:
    """Launches before a product, what it multiplies then, its row stride, and scratch for it.

    Without a prologue that is argument 0 itself.
    """
    x = request.args[0]
    if "norm" not in named and "delta" not in named:
        if x.strides[-1] != 1:
            return Declined("the rows of x are not dense")
        return [], Arg(0), x.strides[0], {}
    temps = {"n": x.type} if "norm" in named else {}
    n = Temp("n") if temps else None
    call = prologue_call(request, named, s, n)
    if isinstance(call, Declined):
        return call
    multiplied = n or s
    assert multiplied is not None
    return [call], multiplied, x.shape[-1], temps
