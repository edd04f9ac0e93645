"""Conversion between host arrays (numpy, torch) and the bytes that are copied to the device."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compiler.dtypes import DTYPES, dense_bytes

Bytes = NDArray[np.uint8]

# Names of torch, and of numpy with ml_dtypes. Of 4-bit dtypes torch counts pairs.
_NAMES = {dtype.torch: name for name, dtype in DTYPES.items() if dtype.bits >= 8}


def is_torch_tensor(value: Any) -> bool:
    """Whether `value` can be treated as a torch tensor, without importing torch."""
    return hasattr(value, "data_ptr") and hasattr(value, "is_cuda")


def torch_dtype_name(value: Any) -> str:
    """The program's name of a torch tensor's dtype, or torch's name if there is none."""
    name = str(value.dtype)
    return _NAMES.get(name.removeprefix("torch."), name)


def check_tensor(what: str, value: Any, dtype: str, shape: tuple[int, ...]) -> None:
    """ValueError unless a torch tensor is `dtype[shape]`."""
    found, dims = torch_dtype_name(value), tuple(value.shape)
    if (found, dims) != (dtype, shape):
        raise ValueError(f"{what}: expected {dtype}{list(shape)}, found {found}{list(dims)}")


def host_array(what: str, value: Any, dtype: str, shape: tuple[int, ...]) -> Bytes:
    """The bytes of `value`, contiguous; they keep its memory alive.

    `value` is a torch tensor on the CPU, or a numpy array, of that dtype and shape. A dtype that
    numpy lacks may be u8 of the same size, and bf16 also u16. ValueError otherwise.
    """
    if is_torch_tensor(value):
        check_tensor(what, value, dtype, shape)
        if value.device.type != "cpu":
            raise ValueError(f"{what}: expected a tensor on the CPU, found one on {value.device}")
        tensor = value.detach().resolve_conj().resolve_neg().contiguous()
        nbytes = dense_bytes(dtype, shape)
        if nbytes == 0:
            return np.empty(0, np.uint8)
        return memory_view(tensor.data_ptr(), nbytes, tensor)
    array: NDArray[Any] = np.asarray(value)
    nbytes = dense_bytes(dtype, shape)
    exact = (_NAMES.get(array.dtype.name), array.shape) == (dtype, shape) and array.dtype.isnative
    raw = not DTYPES[dtype].exact and array.dtype == np.uint8
    bits = dtype == "bf16" and array.dtype == np.uint16 and array.shape == shape
    if not exact and not bits and not (raw and array.nbytes == nbytes):
        raise ValueError(
            f"{what}: expected {dtype}{list(shape)} ({nbytes} bytes), "
            f"found {array.dtype}{list(array.shape)} ({array.nbytes} bytes)"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def to_array(data: Bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A copy of `data` as `dtype[shape]`, one of READABLE.

    bf16 and f16 become f32, which holds both exactly.
    """
    values: NDArray[Any] = data.view(DTYPES[dtype].numpy)
    if dtype == "bf16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        values = values.astype(np.float32) if dtype == "f16" else values.copy()
    return values.reshape(shape)


def memory_view(address: int, nbytes: int, owner: object = None) -> Bytes:
    """Bytes over foreign host memory; they keep `owner` alive."""
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    memory.owner = owner
    return np.frombuffer(memoryview(memory), np.uint8)
