"""Nodes of `experts` in all sizes and forms, checked against the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from ingot.compiler.ops.glu import CLAMPED
from ingot.compiler.ops.moe import experts
from kernel_checks import Given, Packed, Strided, Weight, check_node


@dataclass(frozen=True)
class Case:
    """Sizes and forms of a node."""

    tokens: int = 3
    k: int = 2
    count: int = 4
    width: int = 40
    inner: int = 24
    dtype: torch.dtype = torch.float32
    gate_up: int | None = None  # the group of an MXFP4 weight
    down: int | None = None
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    residual: bool = False
    strided: bool = False
    index: torch.dtype = torch.int64
    weights: torch.dtype = torch.float32

    def attrs(self) -> dict[str, Any]:
        attrs: dict[str, Any] = {"activation": self.activation, "gated": self.gated}
        if self.activation == CLAMPED:
            attrs |= {"alpha": 1.702, "limit": 1.5}
        return attrs

    def call(self, indices: torch.Tensor | None = None) -> tuple[list[Given], dict[str, Any]]:
        """Its operands and attributes."""

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape).to(self.dtype)

        def weight(group: int | None, *shape: int) -> Given:
            drawn = (torch.randn(shape) * shape[-1] ** -0.5).to(self.dtype)
            return Packed(drawn, group) if group else Weight(drawn)

        x = draw(self.tokens, self.width)
        if indices is None:
            indices = torch.rand(self.tokens, self.count).argsort(1)[:, : self.k]
        rows = (1 + self.gated) * self.inner
        args: list[Given] = [
            Strided(x) if self.strided else x,
            torch.rand(self.tokens, self.k).to(self.weights),
            indices.to(self.index),
            weight(self.gate_up, self.count, rows, self.width),
            weight(self.down, self.count, self.width, self.inner),
        ]
        named = self.attrs()
        if self.biased:
            named["gate_up_bias"] = Weight(draw(self.count, rows))
            named["down_bias"] = Weight(draw(self.count, self.width))
        if self.residual:
            added = draw(self.tokens, self.width)
            named["residual"] = Strided(added) if self.strided else added
        return args, named


def check(case: Case, indices: torch.Tensor | None = None, **driver: Any) -> Any:
    """The node equals its reference; `driver` as check_node takes it."""
    # A hidden value rounds once more than the reference's in f64, and so does every part.
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[case.dtype]
    return check_node(experts, *case.call(indices), tolerance=tolerance, **driver)
