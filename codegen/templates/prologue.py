"""What stands before a product: the launch of its prologue, and what is multiplied then."""

from __future__ import annotations

from ...compiler.types import TensorType
from ..request import Arg, Call, Declined, Ref, Request, Temp
from .norms import prologue_call, row_step


def normed_input(
    request: Request, named: dict[str, int], s: Ref | None
) -> tuple[list[Call], Ref, int, dict[str, TensorType]] | Declined:
    """Launches before a product, what it multiplies then, its row stride, and scratch for it.

    `named` are the node's optional operands, `s` is where the sum goes that a delta makes. Without
    a prologue argument 0 itself is multiplied.
    """
    x = request.args[0]
    if "norm" not in named and "delta" not in named:
        step = row_step(x)
        if step is None:
            return Declined(f"the rows of x {x.type} do not lie in one step")
        return [], Arg(0), step, {}
    temps = {"n": x.type} if "norm" in named else {}
    n = Temp("n") if temps else None
    eps = request.attrs.get("eps"), request.attrs.get("post_eps")
    call = prologue_call(request, named, n, s, *eps)
    if isinstance(call, Declined):
        return call
    multiplied = n or s
    assert multiplied is not None
    return [call], multiplied, x.shape[-1], temps
