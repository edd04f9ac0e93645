"""What stands before a product: its norm in the product itself, or the launch of its prologue.

Few tokens: every program of a product reads whole rows of x, so it multiplies them by the norm's
weight as it reads, adds up their squares, and scales its sums at the end. That rounds each element
once, as a norm before it would, and saves a launch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from ....compiler.types import TensorType
from ...kernel_query import Arg, Call, Declined, KernelQuery, Operand, Ref, Result, Temp
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

    `norm` is the weight by which the product itself norms its input; `note` says of a norm where
    it is computed and why.
    """

    calls: list[Call]
    x: Ref
    step: int
    temps: dict[str, TensorType] = field(default_factory=dict[str, TensorType])
    norm: Arg | None = None
    note: str = ""


def normed_input(query: KernelQuery, sum_result: int = 1) -> ProductInput | Declined:
    """What a product with argument 1 multiplies.

    The sum that a delta makes is the node's result `sum_result`. Without a prologue argument 0
    itself is multiplied.
    """
    x, norm = query.args[0], query.operand("norm")
    delta = query.operand("delta") is not None
    note = ""
    if not delta:
        reason = _norm_first(query, norm) if norm else ""
        step = row_step(x)
        if not reason:
            if step is None:
                return Declined(f"the rows of x {x.type} do not lie in one step")
            note = ", its norm within" if norm else ""
            return ProductInput([], Arg(0), step, norm=query.ref("norm"), note=note)
        note = f", after its norm: {reason}"
    elif norm:
        note = ", after its norm: the sum before it is a result"
    temps = {"n": x.type} if norm else {}
    n, s = Temp("n") if norm else None, Result(sum_result) if delta else None
    call = prologue_call(query, n, s, query.attrs.get("eps"), query.attrs.get("post_eps"))
    if isinstance(call, Declined):
        return call
    multiplied = n or s
    assert multiplied is not None
    return ProductInput([call], multiplied, x.shape[-1], temps, note=note)


def _norm_first(query: KernelQuery, gain: Operand) -> str:
    """Why the norm by `gain` is a launch before the product; empty where it is not."""
    x, weight = query.args[:2]
    if prod(x.shape[:-1]) > FEW:
        return "tokens are many"
    if takes(query, prod(x.shape[:-1]), 1):
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
