"""What stands before a GEMM: its norm within it, or the launch of its prologue.

Few tokens: every program of a GEMM reads whole rows of x, so it can norm them as well, which saves
a launch. On NVIDIA it multiplies them by the norm's weight as it reads, adds up their squares, and
scales its sums at the end; on AMD's matrix cores it norms them first. Either way each element is
rounded once, as by a norm before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from ....compiler.types import TensorType
from ...kernel_query import Arg, Call, Declined, KernelQuery, Operand, Ref, Result, Temp
from ..rowwise.norms import prologue_call, row_step
from .product import FEW


@dataclass(frozen=True)
class ProductInput:
    """Launches before a product, what it multiplies then, its row stride, and scratch for it.

    `norm` is the weight by which the product itself norms its input; `note` says of a norm where
    it is computed and why.
    """

    x: Ref
    step: int
    calls: tuple[Call, ...] = ()
    temps: dict[str, TensorType] = field(default_factory=dict[str, TensorType])
    norm: Arg | None = None
    note: str = ""


def inputs(query: KernelQuery, sum_result: int = 1) -> Iterator[ProductInput | Declined]:
    """Ways to make what a product with argument 1 multiplies.

    The sum that a delta makes is the node's result `sum_result`. Without a prologue argument 0
    itself is multiplied.
    """
    x, norm = query.args[0], query.operand("norm")
    step = row_step(x)
    if query.operand("delta"):
        yield _before(query, Result(sum_result), "the sum before it is a result" if norm else "")
    elif norm is None:
        if step is None:
            yield Declined(f"the rows of x {x.type} do not lie in one step")
        else:
            yield ProductInput(Arg(0), step)
    else:
        why = _not_within(query, norm)
        if why or step is None:
            yield Declined(f"a norm within: {why}")
        else:
            yield ProductInput(Arg(0), step, norm=query.ref("norm"), note=", its norm within")
        yield _before(query, None, why or "the product is large")


def _before(query: KernelQuery, s: Ref | None, why: str) -> ProductInput | Declined:
    """The launch of the prologue, and the product of what it makes."""
    x, norm = query.args[0], query.operand("norm")
    n = Temp("n") if norm else None
    call = prologue_call(query, n, s, query.attrs.get("eps"), query.attrs.get("post_eps"))
    if isinstance(call, Declined):
        return call
    multiplied = n or s
    assert multiplied is not None
    temps = {"n": x.type} if norm else {}
    note = f", after its norm: {why}" if norm else ""
    return ProductInput(multiplied, x.shape[-1], (call,), temps, note=note)


def _not_within(query: KernelQuery, gain: Operand) -> str:
    """Why no product norms its input by `gain` itself; empty where one does."""
    x, weight = query.args[:2]
    tokens = prod(x.shape[:-1])
    if tokens > FEW:
        return "tokens are many"
    if row_step(x) is None or not gain.dense:
        return "rows do not lie in one step"
    if x.type.dtype not in ("bf16", "f32"):
        return f"a product of unnormed {x.type.dtype} may leave its range"
    if weight.packed and weight.packed.fragments and gain.type.dtype != "bf16":
        return f"fragments are of bf16, its weight is {gain.type.dtype}"
    return ""
