"""The IR's dtype names and torch's dtypes, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .dtypes import DTYPES
from .types import TensorType

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, dtype.torch) for name, dtype in DTYPES.items()
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of IR dtype `name`; KeyError for an unknown name."""
    return TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The IR's name of a torch dtype; TypeError where it has none."""
    if dtype not in _NAMES:
        raise TypeError(f"{dtype} has no name in the IR; known are {', '.join(_NAMES.values())}")
    return _NAMES[dtype]


def type_of(tensor: torch.Tensor) -> TensorType:
    """The IR type of a concrete tensor."""
    return TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))


def literals_as_tensors(args: Sequence[Any], dtypes: Sequence[str]) -> tuple[Any, ...]:
    """`args` with the numbers of literals as tensors, unless a tensor beside them has their dtype.

    Only there does torch give the result that dtype for a plain number.
    """
    beside = {d for d, x in zip(dtypes, args, strict=True) if isinstance(x, torch.Tensor)}
    return tuple(
        x if isinstance(x, torch.Tensor) or d in beside else torch.tensor(x, dtype=torch_dtype(d))
        for d, x in zip(dtypes, args, strict=True)
    )


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision that references compute in: f32, or f64 where `x` is f64 already."""
    return x if x.dtype == torch.float64 else x.float()
