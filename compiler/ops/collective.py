"""Collectives: what the ranks of a tensor-parallel run exchange. One graph a rank.

A reference that takes part in an exchange has the keyword `communicator` (`Op.collective` says so):
whoever runs the graph hands in this rank's end of the line. Every rank must run the same
collectives in the same order. The attribute `ranks` of such an op is how many there are; without a
communicator there is one, and an op that was made for more refuses to compute.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from ..axes import along_dim, elementwise, rule
from ..ir import Op, Sample, per_element
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError
from .pointwise import float_type
from .prologue import check_prologue, run_prologue
from .shape import axis_of, replaced


class Communicator(Protocol):
    """One rank's end of an exchange among `ranks` of them."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Give `x` to every rank; what each of them gave, in the order of ranks."""
        ...


def exchanged(x: torch.Tensor, ranks: int, communicator: Communicator | None) -> list[torch.Tensor]:
    """`x` of every rank in order. VerifyError unless there are `ranks` of them."""
    found = 1 if communicator is None else communicator.ranks
    if found != ranks:
        raise VerifyError(f"a collective among {ranks} ranks runs among {found}")
    return [x] if communicator is None else communicator.exchange(x)


def summed(x: torch.Tensor, ranks: int, communicator: Communicator | None = None) -> torch.Tensor:
    """The sum of every rank's `x`: in f32, in the order of ranks, rounded once.

    So all ranks hold the same bits, and an element's sum does not depend on its neighbours.
    """
    first, *others = exchanged(x, ranks, communicator)
    total = wide(first)
    for other in others:
        total = total + wide(other)
    return total.to(x.dtype)


def check_ranks(name: str, ranks: int) -> None:
    if ranks < 1:
        raise VerifyError(f"{name}: expected at least one rank, found {ranks}")


# ---- all_reduce: the sum over ranks, on every rank


def _all_reduce_infer(x: TensorType, *, ranks: int) -> Types:
    check_ranks("all_reduce", ranks)
    return float_type("all_reduce", x)


_T = TensorType("f32", (4, 6))
all_reduce = Op(
    "all_reduce",
    _all_reduce_infer,
    summed,
    samples=(Sample((_T,), {"ranks": 1}),),
    collective=True,
    axes=elementwise,
)


# ---- all_gather: what the ranks hold, joined along one dim in the order of ranks, on every rank


def _all_gather_infer(x: TensorType, *, dim: int, ranks: int) -> Types:
    check_ranks("all_gather", ranks)
    axis = axis_of("all_gather", x, dim)
    size: Any = x.shape[axis]
    return (x.with_shape(replaced(x.shape, axis, size * ranks)),)


def _all_gather_reference(
    x: torch.Tensor, *, dim: int, ranks: int, communicator: Communicator | None = None
) -> torch.Tensor:
    return torch.cat(exchanged(x, ranks, communicator), dim)


all_gather = Op(
    "all_gather",
    _all_gather_infer,
    _all_gather_reference,
    samples=(Sample((_T,), {"dim": -1, "ranks": 1}), Sample((_T,), {"dim": 0, "ranks": 1})),
    collective=True,
    axes=along_dim(),
)


# ---- add_rms_norm: x + delta, and its rms_norm. With several `ranks`, delta is first summed over
# them: an all_reduce with the sum and the norm behind it. The sum is rounded before the norm reads
# it, and the norm once, nothing else is.


def _add_norm_infer(
    x: TensorType, delta: TensorType, weight: TensorType, *, eps: float, ranks: int = 1
) -> Types:
    check_ranks("add_rms_norm", ranks)
    check_prologue("add_rms_norm", x, weight, delta, None, eps, None)
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
    n, (total,) = run_prologue(x, weight, delta, eps=eps)
    return (total, n)


_X, _V = TensorType("f32", (3, 8)), TensorType("f32", (8,))
add_rms_norm = Op(
    "add_rms_norm",
    _add_norm_infer,
    _add_norm_reference,
    per_element(5),
    (Sample((_X, _X, _V), {"eps": 1e-6}),),
    collective=True,
    axes=rule("x[*,k] delta[*,k] weight[k] -> [*,k], [*,k]; k whole"),
)
