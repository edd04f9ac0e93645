"""A GEMM as the kernels of this room are asked for it, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...kernel_query import Call, Declined, KernelQuery, Operand
from .epilogue import Epilogue
from .weight import Weight

# The most tokens that kernels for few take: a block of a matrix instruction.
FEW = 16


class Rows(NamedTuple):
    """The left operand: rows of dense elements, STEP apart; of several matrices, HEAD apart."""

    data: Any
    STEP: Any
    HEAD: Any


class Norm(NamedTuple):
    """An rms_norm of the left operand's rows, by a weight [K]."""

    weight: Any
    EPS: Any


@dataclass(frozen=True)
class Product:
    """y [tokens, N] = epilogue(norm(x) · weightᵀ) for each of `heads` matrices, whose results lie
    `y_head` elements apart. `held` is the weight's operand, `n` counts y's columns."""

    query: KernelQuery
    x: Rows
    weight: Weight
    held: Operand
    epilogue: Epilogue
    tokens: int
    n: int
    norm: Norm | None = None
    norm_dtype: str = ""
    heads: int = 1
    y_head: int = 0

    @property
    def few(self) -> bool:
        return self.tokens <= FEW

    @property
    def x_dtype(self) -> str:
        return self.query.args[0].type.dtype

    @property
    def packed(self) -> bool:
        return self.held.packed is not None


@dataclass(frozen=True)
class GemmLaunch:
    """One way to compute a Product: the launch, which kernel of `prices.GEMM_BANDWIDTH` it is, and
    what it is called in a reason. Several forms of a kernel are told apart by `form`."""

    call: Call
    kernel: str
    name: str
    form: str = ""


Variant = Callable[[Product], Iterable[GemmLaunch | Declined]]
