"""The IR's dtype names and torch's dtypes, both ways."""

from __future__ import annotations

import torch

from .types import TensorType

TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "u8": torch.uint8,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "f64": torch.float64,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "f8e4m3": torch.float8_e4m3fn,
    "f8e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
    "f4e2m1": torch.float4_e2m1fn_x2,
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


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision that references compute in: f32, or f64 where `x` is f64 already."""
    return x if x.dtype == torch.float64 else x.float()
