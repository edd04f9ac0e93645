"""The dtypes of buffers: their sizes, and how numpy and safetensors hold them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Dtype:
    """`bits` of one element, its name in safetensors files, and what numpy holds it as.

    `stored` is None where safetensors has no name for it. `exact` is False where numpy has no such
    numbers and holds their bits: bf16, the eight-bit floats, and pairs of four-bit floats.
    """

    bits: int
    stored: str | None
    held: type[np.generic]
    exact: bool = True

    @property
    def per_item(self) -> int:
        """Elements in one item of a numpy array."""
        return np.dtype(self.held).itemsize * 8 // self.bits


DTYPES = {
    "bool": Dtype(8, "BOOL", np.bool_),
    "u8": Dtype(8, "U8", np.uint8),
    "i8": Dtype(8, "I8", np.int8),
    "i16": Dtype(16, "I16", np.int16),
    "i32": Dtype(32, "I32", np.int32),
    "i64": Dtype(64, "I64", np.int64),
    "f16": Dtype(16, "F16", np.float16),
    "bf16": Dtype(16, "BF16", np.uint16, exact=False),
    "f32": Dtype(32, "F32", np.float32),
    "f64": Dtype(64, "F64", np.float64),
    "c64": Dtype(64, "C64", np.complex64),
    "c128": Dtype(128, None, np.complex128),
    "f8e4m3": Dtype(8, "F8_E4M3", np.uint8, exact=False),
    "f8e5m2": Dtype(8, "F8_E5M2", np.uint8, exact=False),
    "e8m0": Dtype(8, "F8_E8M0", np.uint8, exact=False),
    "f4e2m1": Dtype(4, "F4", np.uint8, exact=False),
}
# What outputs may be: numpy has their numbers, or, for bf16, those of f32 which hold them exactly.
READABLE = frozenset(name for name, dtype in DTYPES.items() if dtype.exact) | {"bf16"}


def dense_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense `dtype[shape]`; packed dtypes are rounded up. KeyError: unknown dtype."""
    return -(-prod(shape) * DTYPES[dtype].bits // 8)


__all__ = ["DTYPES", "READABLE", "Dtype", "dense_bytes"]
