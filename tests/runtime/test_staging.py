"""Layouts of staging memory carry every buffer whole, in few copies; arrays become bytes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.compiler.dtypes import dense_bytes
from ingot.compiler.torch_types import TORCH_DTYPES
from ingot.runtime.devices.host_arrays import host_array, to_array
from ingot.runtime.devices.staging import MAX_GAP, lay_out
from ingot.runtime.program import Buffer


@given(
    sizes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 900)), max_size=8),
    seed=st.integers(0, 99),
)
def test_every_buffer_arrives(sizes: list[tuple[int, int]], seed: int) -> None:
    """Buffers of some bytes behind gaps of some bytes, copied as the layout says."""
    rng = np.random.default_rng(seed)
    buffers: list[Buffer] = []
    end = 0
    for index, (nbytes, gap) in enumerate(sizes):
        offset = end + gap
        buffers.append(Buffer(str(index), "u8", (nbytes,), "input", nbytes, offset))
        end = offset + nbytes
    layout = lay_out(rng.permutation(np.array(buffers, dtype=object)).tolist())
    staging = rng.integers(0, 256, layout.nbytes, np.uint8)
    arena = np.zeros(end, np.uint8)
    for copy in layout.copies:
        assert copy.nbytes > 0
        arena[copy.offset : copy.offset + copy.nbytes] = staging[copy.at : copy.at + copy.nbytes]
    assert len(layout.fields) == len(buffers)
    for field in layout.fields:
        buffer = field.buffer
        assert buffer.offset is not None
        sent = staging[field.at : field.at + buffer.nbytes]
        np.testing.assert_array_equal(arena[buffer.offset : buffer.offset + buffer.nbytes], sent)
        assert (field.at - buffer.offset) % 16 == 0
    # Neighbours share a copy, and what is far apart does not.
    full = [b for b in buffers if b.nbytes]
    ends = [(b.offset or 0) + b.nbytes for b in full]
    gaps = [(b.offset or 0) - before for b, before in zip(full[1:], ends, strict=False)]
    if len(full) == len(buffers):
        assert len(layout.copies) == (len(full) > 0) + sum(gap > MAX_GAP for gap in gaps)


@pytest.mark.parametrize("dtype", [d for d in TORCH_DTYPES if d != "f4e2m1"])
def test_bytes_of_tensors(dtype: str) -> None:
    value = torch.randn(4, 6).to(TORCH_DTYPES[dtype])
    raw = value.contiguous().view(torch.uint8).numpy().reshape(-1)
    assert dense_bytes(dtype, (4, 6)) == raw.nbytes
    np.testing.assert_array_equal(host_array("it", value, dtype, (4, 6)), raw)
    turned = value.T
    np.testing.assert_array_equal(
        host_array("it", turned, dtype, (6, 4)),
        turned.contiguous().view(torch.uint8).numpy().reshape(-1),
    )
    with pytest.raises(ValueError, match=r"^it: expected"):
        host_array("it", value, dtype, (6, 4))
    with pytest.raises(ValueError, match=r"^it: expected f64|^it: expected i64"):
        host_array("it", value, "i64" if dtype == "f64" else "f64", (4, 6))


@pytest.mark.parametrize(
    ("numpy_name", "dtype"),
    [("bfloat16", "bf16"), ("float8_e4m3fn", "f8e4m3"), ("float8_e8m0fnu", "e8m0")],
)
def test_dtypes_of_ml_dtypes(numpy_name: str, dtype: str) -> None:
    value = np.arange(1, 7).astype(getattr(ml_dtypes, numpy_name)).reshape(2, 3)
    found = host_array("it", value, dtype, (2, 3))
    assert found.tobytes() == value.tobytes()


def test_conjugates_and_other_byte_orders() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    found = host_array("it", value.conj(), "c64", (2,)).view(np.complex64)
    assert found.tolist() == [1 - 2j, 3 + 4j]
    with pytest.raises(ValueError, match="it: expected f32"):
        host_array("it", np.zeros(2, ">f4"), "f32", (2,))


def test_halves_of_bytes() -> None:
    assert dense_bytes("f4e2m1", (3, 3)) == 5
    assert host_array("it", np.arange(5, dtype=np.uint8), "f4e2m1", (3, 3)).nbytes == 5
    with pytest.raises(ValueError, match=r"f4e2m1\[3, 3\] \(5 bytes\), found uint8\[4\]"):
        host_array("it", np.arange(4, dtype=np.uint8), "f4e2m1", (3, 3))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0, 4)])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "i32"])
def test_arrays_of_bytes(dtype: str, shape: tuple[int, ...]) -> None:
    """Also numbers without dims stay arrays; narrow floats come as f32 of the same value."""
    value = torch.randint(-9, 9, shape).to(TORCH_DTYPES[dtype])
    found = to_array(host_array("x", value, dtype, shape).copy(), dtype, shape)
    assert isinstance(found, np.ndarray) and found.shape == shape
    assert found.dtype == (np.int32 if dtype == "i32" else np.float32)
    np.testing.assert_array_equal(found, value.to(torch.float64).numpy())
