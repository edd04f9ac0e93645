"""Inputs of a compiled module: tensors and numpy arrays, in the dtypes that it was traced with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..compiler.dtypes import DTYPES, FLOATS, INTEGERS
from ..compiler.torch_types import dtype_name, torch_dtype
from ..compiler.types import TensorType

# What numpy calls dtypes that it has from ml_dtypes alone, and holds as bits.
_AS_BITS = {d.torch: d for d in DTYPES.values() if not d.exact and d.bits >= 8}
_LARGEST = torch.iinfo(torch.int64).max


def module_input(name: str, type_: TensorType, value: Any) -> torch.Tensor:
    """`value` as a tensor on the CPU in the dtype of the parameter `name` of `type_`.

    Floats are rounded to another float dtype; integers become integers of another width, where all
    of them fit. ValueError for other kinds; shapes are not looked at.
    """
    expected = f"parameter %{name}: expected {type_}"
    if isinstance(value, np.ndarray | np.generic):
        tensor = _from_numpy(expected, np.asarray(value))
    elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
        tensor = value.detach().cpu()
    else:
        raise ValueError(f"{expected}, as a tensor or a numpy array, found {type(value).__name__}")
    dtype = torch_dtype(type_.dtype)
    if tensor.dtype == dtype:
        return tensor
    try:
        found = dtype_name(tensor.dtype)
    except TypeError as error:
        raise ValueError(f"{expected}, found {tensor.dtype}") from error
    if not any(found in kind and type_.dtype in kind for kind in (FLOATS, INTEGERS)):
        raise ValueError(f"{expected}, found {found}{[*tensor.shape]}")
    cast = tensor.to(dtype)
    if found in INTEGERS and not torch.equal(cast.long(), tensor.long()):
        raise ValueError(f"{expected}, found {found} with numbers that do not fit")
    return cast


def _from_numpy(expected: str, array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over a copy of `array`, or over its memory where torch can take it as it is."""
    if held := _AS_BITS.get(array.dtype.name):
        bits = np.ascontiguousarray(array).view(held.numpy)
        return torch.from_numpy(bits.copy()).view(getattr(torch, held.torch))
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16:
        raise ValueError(f"{expected}, found an array of {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and array.max() > _LARGEST:
            raise ValueError(f"{expected}, found {array.dtype} with numbers that do not fit")
        array = array.astype(np.int64)
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    usable = native if native.flags.writeable else native.copy()
    return torch.from_numpy(usable.reshape(array.shape))
