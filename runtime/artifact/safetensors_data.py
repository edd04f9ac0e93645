"""The tensors of a safetensors file in memory, as numpy arrays over the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...compiler.dtypes import DTYPES, dense_bytes
from .strict_json import IngotError, each, fields, integer, items, mapping, one_of, read_json, text

MAX_HEADER = 100_000_000  # as the format's own library
_MOST_TENSORS = 1 << 20
_BY_STORED = {dtype.safetensors: name for name, dtype in DTYPES.items() if dtype.safetensors}


@dataclass(frozen=True)
class Tensor:
    """`dtype[shape]` (the names of DTYPES) and the bytes that hold it."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def array(self) -> NDArray[Any]:
        """The tensor over the same memory, in what numpy holds the dtype as.

        Pairs of four-bit numbers are one item of the last dim.
        """
        dtype = DTYPES[self.dtype]
        held = np.dtype(dtype.numpy)
        shape, per_item = self.shape, max(8 // dtype.bits, 1)
        if per_item > 1:
            if not shape or shape[-1] % per_item:
                raise IngotError(f"expected whole bytes of {self.dtype}, found {list(shape)}")
            shape = (*shape[:-1], shape[-1] // per_item)
        if not len(self.data):
            return np.empty(shape, held)
        return np.frombuffer(self.data, np.uint8).view(held).reshape(shape)


def read_tensors(data: memoryview, where: str) -> Mapping[str, Tensor]:
    """Every tensor of the file `data`; IngotError unless they fill it exactly, end to end."""
    if len(data) < 8:
        raise IngotError(f"{where}: expected a safetensors file, found {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER, len(data) - 8):
        raise IngotError(
            f"{where}: expected a header of at most {min(MAX_HEADER, len(data) - 8)} bytes, "
            f"found {length}"
        )
    header = mapping(read_json(data[8 : 8 + length], where, MAX_HEADER), where, _MOST_TENSORS)
    body = data[8 + length :]
    found: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in header.items():
        place = f"{where}: {name[:80]!r}"
        if name == "__metadata__":
            for key, item in mapping(value, place, 1024).items():
                text(item, f"{place}: {key[:80]!r}")
            continue
        tensor = fields(value, place, ("dtype", "shape", "data_offsets"))
        dtype = _BY_STORED[one_of(tensor["dtype"], place, _BY_STORED)]
        shape = each(items(tensor["shape"], place, 16), place, integer)
        start, end = each(items(tensor["data_offsets"], place, 2, 2), place, integer)
        if end - start != dense_bytes(dtype, shape):
            raise IngotError(
                f"{place}: expected {dense_bytes(dtype, shape)} bytes for {dtype}{list(shape)}, "
                f"found {end - start}"
            )
        found[name] = Tensor(dtype, shape, body[start:end])
        spans.append((start, end, place))
    at = 0
    for start, end, place in sorted(spans):
        if start != at:
            raise IngotError(f"{place}: expected it at byte {at} of the data, found it at {start}")
        at = end
    if at != len(body):
        raise IngotError(f"{where}: expected {at} bytes of tensors, found {len(body)}")
    return found


__all__ = ["MAX_HEADER", "Tensor", "read_tensors"]
