"""What stands before a product: its norm in the product itself, or the launch of its prologue.

Few tokens: every program of a product reads whole rows of x, so it multiplies them by the norm's
weight as it reads, adds up their squares, and scales its sums at the end. That rounds each element
once, as a norm before it would, and saves a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from ....compiler.types import TensorType
from ...request import Arg, Call, Declined, Ref, Request, Temp
from ..rowwise.norms import prologue_call, row_step
from .fragment_linear import FEW
from .mfma_linear import takes

# Bytes of a weight over which a launch costs less than the norm does in every program of its
# product. Of an 8B in MXFP4, on an H200, one token took 2.99 ms with all norms in launches before,
# 3.02 with those of products up to 16 MiB within (36 launches fewer), 3.04 with all.
_LARGE = 16 << 20


@dataclass(frozen=True)
class ProductInput:
    """Launches before a product, what it multiplies then, its row stride, and scratch for it.

    `norm` is the argument by which the product itself norms its input; `note` says of a norm where
    it is computed and why.
    """

    calls: list[Call]
    x: Ref
    step: int
    temps: dict[str, TensorType] = field(default_factory=dict[str, TensorType])
    norm: int | None = None
    note: str = ""


def normed_input(request: Request, named: dict[str, int], s: Ref | None) -> ProductInput | Declined:
    """What a product with argument 1 multiplies.

    `named` are the node's optional operands, `s` is where the sum goes that a delta makes. Without
    a prologue argument 0 itself is multiplied.
    """
    x = request.args[0]
    note = ""
    if "delta" not in named:
        reason = _norm_first(request, named["norm"]) if "norm" in named else ""
        step = row_step(x)
        if not reason:
            if step is None:
                return Declined(f"the rows of x {x.type} do not lie in one step")
            note = ", its norm within" if "norm" in named else ""
            return ProductInput([], Arg(0), step, norm=named.get("norm"), note=note)
        note = f", after its norm: {reason}"
    elif "norm" in named:
        note = ", after its norm: the sum before it is a result"
    temps = {"n": x.type} if "norm" in named else {}
    n = Temp("n") if temps else None
    eps = request.attrs.get("eps"), request.attrs.get("post_eps")
    call = prologue_call(request, named, n, s, *eps)
    if isinstance(call, Declined):
        return call
    multiplied = n or s
    assert multiplied is not None
    return ProductInput([call], multiplied, x.shape[-1], temps, note=note)


def _norm_first(request: Request, norm: int) -> str:
    """Why the norm by argument `norm` is a launch before the product; empty where it is not."""
    x, weight, gain = request.args[0], request.args[1], request.args[norm]
    if prod(x.shape[:-1]) > FEW:
        return "tokens are many"
    if takes(request, prod(x.shape[:-1]), 1):
        return "in registers it costs every program as much as the weight"
    if row_step(x) is None or not gain.dense:
        return "rows do not lie in one step"
    if x.type.dtype not in ("bf16", "f32"):
        return f"a product of unnormed {x.type.dtype} may leave its range"
    if weight.packed and weight.packed.fragments and gain.type.dtype != "bf16":
        return f"fragments are of bf16, its weight is {gain.type.dtype}"
    if weight.nbytes > _LARGE:
        return "the product is large"
    return ""
