"""Gated linear units (Shazeer 2020, arXiv:2002.05202): activation(gate) · up."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..axes import elementwise
from ..dtypes import FLOATS
from ..ir import Op, Sample, per_element
from ..torch_types import wide
from ..types import TensorType, Types, VerifyError
from .pointwise import gelu_of, gelu_tanh_of, sigmoid_of, silu_of

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu_of,
    "gelu": gelu_of,
    "gelu_tanh": gelu_tanh_of,
    "relu": torch.relu,
    "sigmoid": sigmoid_of,
    "tanh": torch.tanh,
}
# gpt-oss: min(gate, limit) · sigmoid(alpha · gate) · (clamp(up, ±limit) + 1)
CLAMPED = "clamped_swiglu"


def check_activation(name: str, activation: str, alpha: float, limit: float) -> None:
    """VerifyError unless `activation` is known and has the parameters it needs."""
    if activation not in (*ACTIVATIONS, CLAMPED):
        known = ", ".join((*ACTIVATIONS, CLAMPED))
        raise VerifyError(f"{name}: activation is one of {known}; found {activation!r}")
    if (activation == CLAMPED) != (alpha > 0 and limit > 0):
        raise VerifyError(f"{name}: {activation} with alpha {alpha} and limit {limit}")


def gated(
    gate: torch.Tensor, up: torch.Tensor, activation: str, alpha: float = 0.0, limit: float = 0.0
) -> torch.Tensor:
    """The gated unit in f32 (or f64), rounded once to the dtype of `gate`."""
    g, u = wide(gate), wide(up)
    if activation == CLAMPED:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
        return (g * sigmoid_of(alpha * g) * (u + 1)).to(gate.dtype)
    return (ACTIVATIONS[activation](g) * u).to(gate.dtype)


def _glu_infer(
    gate: TensorType, up: TensorType, *, activation: str, alpha: float = 0.0, limit: float = 0.0
) -> Types:
    check_activation("glu", activation, alpha, limit)
    if gate != up or gate.dtype not in FLOATS:
        raise VerifyError(f"glu: expected gate and up of one float type, found {gate} and {up}")
    return (gate,)


_X = TensorType("f32", (3, 8))
glu = Op(
    "glu",
    _glu_infer,
    gated,
    per_element(5),
    (
        *(Sample((_X, _X), {"activation": a}) for a in ACTIVATIONS),
        Sample((_X, _X), {"activation": CLAMPED, "alpha": 1.702, "limit": 7.0}),
    ),
    axes=elementwise,
)
