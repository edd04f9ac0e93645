"""Custom op ingot::hadamard, by which a traced model turns the activations of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from ...compiler.ops.hadamard import hadamard
from ..checkpoints.rotations import Rotated


@torch.library.custom_op("ingot::hadamard", mutates_args=())
def traced_hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., K], each block of its last dim times H_block / sqrt(block)."""
    (out,) = hadamard.reference(x, block=block)
    return out.clone()


@traced_hadamard.register_fake
def _(x: Any, block: Any) -> Any:
    return torch.empty_like(x)


def rotate_activations(model: torch.nn.Module, rotated: Iterable[Rotated]) -> None:
    """Make `model` turn the inputs and outputs of its linear layers, as `rotated` says."""
    for place in rotated:
        module = model.get_submodule(place.module)
        turn: Callable[[torch.Tensor], torch.Tensor] = partial(traced_hadamard, block=place.block)
        if place.location == "input":
            module.register_forward_pre_hook(partial(_turn_input, turn))
        else:
            module.register_forward_hook(partial(_turn_output, turn))


def _turn_input(turn: Callable[[torch.Tensor], torch.Tensor], _: Any, inputs: Any) -> Any:
    (x,) = inputs
    return (turn(x),)


def _turn_output(turn: Callable[[torch.Tensor], torch.Tensor], _: Any, __: Any, out: Any) -> Any:
    return turn(out)
