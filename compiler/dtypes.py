"""The dtypes: one row each, with what torch, numpy, safetensors, Triton and C call them.

Standard library only: the compiler and the runtime share this table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

Kind = Literal["bool", "integer", "float", "complex", "narrow"]


@dataclass(frozen=True)
class Dtype:
    """`bits` of one element, and its names elsewhere.

    `numpy` is what numpy holds it as: where that is not torch's name, numpy lacks the numbers and
    holds their bits. `safetensors`, `triton` and `ctypes` are None where files do not store it,
    kernels do not compute with it, and kernels take no such number by value. A 4-bit dtype is
    stored in pairs, the first in the low bits.
    """

    bits: int
    kind: Kind
    torch: str
    numpy: str
    safetensors: str | None
    triton: str | None = None
    ctypes: str | None = None

    @property
    def exact(self) -> bool:
        """Whether numpy has the numbers, not just their bits."""
        return self.numpy == self.torch


# f4e2m1 and e8m0 are the element and scale formats of OCP Microscaling v1.0.
DTYPES = {
    "bool": Dtype(8, "bool", "bool", "bool", "BOOL", "i1"),
    "u8": Dtype(8, "integer", "uint8", "uint8", "U8", "u8"),
    "i8": Dtype(8, "integer", "int8", "int8", "I8", "i8"),
    "i16": Dtype(16, "integer", "int16", "int16", "I16", "i16"),
    "i32": Dtype(32, "integer", "int32", "int32", "I32", "i32", "c_int32"),
    "i64": Dtype(64, "integer", "int64", "int64", "I64", "i64", "c_int64"),
    "f16": Dtype(16, "float", "float16", "float16", "F16", "fp16"),
    "bf16": Dtype(16, "float", "bfloat16", "uint16", "BF16", "bf16"),
    "f32": Dtype(32, "float", "float32", "float32", "F32", "fp32", "c_float"),
    "f64": Dtype(64, "float", "float64", "float64", "F64", "fp64"),
    "c64": Dtype(64, "complex", "complex64", "complex64", "C64"),
    "c128": Dtype(128, "complex", "complex128", "complex128", None),
    "f8e4m3": Dtype(8, "narrow", "float8_e4m3fn", "uint8", "F8_E4M3"),
    "f8e5m2": Dtype(8, "narrow", "float8_e5m2", "uint8", "F8_E5M2"),
    "e8m0": Dtype(8, "narrow", "float8_e8m0fnu", "uint8", "F8_E8M0"),
    "f4e2m1": Dtype(4, "narrow", "float4_e2m1fn_x2", "uint8", "F4"),
}
FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.kind == "float")
INTEGERS = tuple(name for name, dtype in DTYPES.items() if dtype.kind == "integer")
# What outputs may be: numpy has their numbers, or, for bf16, those of f32 which hold them exactly.
READABLE = frozenset(name for name, dtype in DTYPES.items() if dtype.exact) | {"bf16"}
# Formats of weights that several tensors make up (ops/mxfp4.py): no value has such a dtype, but
# reads are priced by it. Bits of one element with its share of the scale.
STORED_BITS = {"mxfp4g16": Fraction(9, 2), "mxfp4g32": Fraction(17, 4)}


def dense_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense `dtype[shape]`; packed dtypes are rounded up. KeyError: unknown dtype."""
    return -(-prod(shape) * DTYPES[dtype].bits // 8)
