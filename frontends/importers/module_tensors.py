"""The tensors of a module in memory, and a copy of the module that shares them."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, TypeVar

import torch

from .source_error import SourceError

M = TypeVar("M", bound=torch.nn.Module)


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under each of its names: persistent or not, shared or not."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def owner_of(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module that holds the tensor called `name`, and the tensor's name in it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def shared_copy(model: M) -> M:
    """A copy of `model` in eval mode that shares its parameters and buffers.

    Its parameters want no gradient. SourceError where an attribute of a module cannot be copied.
    """
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(model):
        shared: torch.Tensor = tensor.detach()
        if isinstance(tensor, torch.nn.Parameter):
            shared = torch.nn.Parameter(shared, requires_grad=False)
        memo.setdefault(id(tensor), shared)
    for part in model.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # as weight_norm leaves it
                memo.setdefault(id(value), value.detach().clone())
    try:
        return deepcopy(model, memo).eval()
    except (TypeError, RuntimeError, AttributeError) as error:
        raise SourceError(
            f"{type(model).__name__} cannot be copied to be traced: a module holds something that "
            f"copy.deepcopy refuses: {error}"
        ) from error
