"""Quantized weights read as floats: exact, and rounded once; against arithmetic in fractions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ingot.frontends.checkpoints.dequantize import BlockFp8, Dequantized, Int4, Nvfp4, rounded
from ingot.frontends.checkpoints.safetensors_files import File
from ingot.frontends.importers.source_error import SourceError
from safetensors.torch import save_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def nearest(exact: Fraction, dtype: torch.dtype) -> float:
    """`exact` rounded to nearest, ties to even, by trying what is around it in `dtype`."""
    start = torch.tensor(float(exact), dtype=torch.float64).to(dtype)
    ends = [torch.tensor(end, dtype=dtype) for end in (torch.inf, -torch.inf)]
    around = [start, *(torch.nextafter(start, end) for end in ends)]
    finite = [x for x in around if x.isfinite()]
    bits = torch.int32 if dtype == torch.float32 else torch.int16

    def rank(x: torch.Tensor) -> tuple[Fraction, int]:
        return abs(Fraction(x.item()) - exact), int(x.view(bits)) & 1

    return min(finite, key=rank).item()


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.floats(-6e4, 6e4), st.integers(-60, 60), st.sampled_from([-1, 0, 1]))
def test_rounded_once(dtype: torch.dtype, number: float, power: int, nudge: int) -> None:
    """Also next to ties of the narrow dtype, where rounding through f32 loses the side."""
    tie = torch.tensor(number, dtype=dtype).double()
    step = torch.nextafter(tie.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double() - tie
    for x in (torch.tensor(number).double(), tie + step / 2 + nudge * step * 2.0**-power):
        if x.abs() > torch.finfo(dtype).max:
            continue
        assert rounded(x[None], dtype).item() == nearest(Fraction(x.item()), dtype)


def test_twice_would_be_otherwise() -> None:
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert x.to(torch.bfloat16) == 1 and rounded(x, torch.bfloat16) == 1 + 2.0**-7
    assert rounded(-x, torch.bfloat16) == -1 - 2.0**-7
    assert rounded(torch.tensor([1e39, -1e39]).double(), torch.bfloat16).isinf().all()


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., File]:
    def store(**tensors: torch.Tensor) -> File:
        save_file(tensors, tmp_path / "x.safetensors")
        return File(tmp_path / "x.safetensors")

    return store


def assert_reads(source: Dequantized, exact: list[list[Fraction]]) -> None:
    for dtype in DTYPES:
        found = source.read_as(dtype)
        assert found.dtype == dtype and found.shape == source.shape
        assert found.tolist() == [[nearest(x, dtype) for x in row] for row in exact]
    into = torch.zeros(source.shape[0], source.shape[1] + 3, dtype=torch.bfloat16)
    rows, columns = source.shape
    source.read_into(into[:, 2:-1], ((0, rows), (0, columns)))
    assert torch.equal(into[:, 2:-1], source.read_as(torch.bfloat16))
    assert not into[:, [0, 1, -1]].any()
    part = torch.empty(1, columns - 1, dtype=torch.float32)
    source.read_into(part, ((1, 2), (1, columns)))
    assert torch.equal(part, source.read_as(torch.float32)[1:2, 1:])


def fractions(tensor: torch.Tensor) -> list:
    return [fractions(t) if t.ndim else Fraction(t.item()) for t in tensor.double()]


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_blocks_with_ragged_edges(stored: Callable[..., File], scales: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 21).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3).add(0.01).to(scales)
    file = stored(w=weight, s=scale)
    own = file.tensors["s"]
    own = own.as_bytes() if own.dtype == "e8m0" else own
    source = BlockFp8("w", file, (11, 21), file.tensors["w"], own, (4, 8))
    w, s = fractions(weight), fractions(scale.float())
    assert_reads(source, [[w[i][j] * s[i // 4][j // 8] for j in range(21)] for i in range(11)])


def test_fp8_stacks(stored: Callable[..., File]) -> None:
    weight, scale = torch.randn(2, 8, 8).to(torch.float8_e4m3fn), torch.rand(2, 2, 1)
    file = stored(w=weight, s=scale)
    source = BlockFp8("w", file, (2, 8, 8), file.tensors["w"], file.tensors["s"], (4, 8))
    expected = weight.double() * scale.double().repeat_interleave(4, 1)
    assert torch.equal(source.read_as(torch.float64), expected)


@pytest.mark.parametrize("divide", [False, True], ids=["multiply", "divide"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_nvfp4(stored: Callable[..., File], divide: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    codes = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    scales = torch.rand(5, 3).mul(400).to(torch.float8_e4m3fn)
    whole = torch.full(shape, 3.1e3 if divide else 2.7e-4)
    file = stored(c=codes, s=scales, g=whole)
    parts = (file.tensors[n] for n in "csg")
    source = Nvfp4("w", file, (5, 48), *parts, divide)
    numbers = fractions(E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(1).int()])
    s, g = fractions(scales.float()), Fraction(whole.item())
    g = 1 / g if divide else g
    assert_reads(source, [[numbers[i][j] * s[i][j // 16] * g for j in range(48)] for i in range(5)])
    assert torch.signbit(source.read_as(torch.bfloat16)).any()


def test_int4(stored: Callable[..., File]) -> None:
    torch.manual_seed(2)
    numbers = torch.randint(-8, 8, (5, 64))
    words = ((numbers + 8).view(5, 8, 8) << torch.arange(0, 32, 4)).sum(-1).int()
    scales = torch.randn(5, 2).bfloat16()
    file = stored(p=words, s=scales, n=torch.tensor([5, 64]))
    source = Int4("w", file, (5, 64), *(file.tensors[n] for n in "psn"))
    s = fractions(scales)
    exact = [[Fraction(numbers[i, j].item()) * s[i][j // 32] for j in range(64)] for i in range(5)]
    assert_reads(source, exact)
    other = Int4("w", file, (5, 32), *(file.tensors[n] for n in "psn"))
    with pytest.raises(SourceError, match=r"w: its weight_shape says \[5, 64\]"):
        other.read_as(torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_that_are_not_finite(stored: Callable[..., File], bad: float) -> None:
    weight = torch.ones(4, 8).to(torch.float8_e4m3fn)
    file = stored(w=weight, s=torch.tensor([[1.0], [bad]]), e=torch.tensor([[127], [255]]).byte())
    for name in ("s", "e"):
        source = BlockFp8("x.w", file, (4, 8), file.tensors["w"], file.tensors[name], (2, 8))
        with pytest.raises(
            SourceError, match=r"x\.w: x\.safetensors holds a NaN or infinite scale"
        ):
            source.read_as(torch.bfloat16)


def test_division_by_zero(stored: Callable[..., File]) -> None:
    scales = torch.ones(1, 1).to(torch.float8_e4m3fn)
    file = stored(c=torch.zeros(1, 8).byte(), s=scales, g=torch.zeros(1))
    source = Nvfp4("w", file, (1, 16), *(file.tensors[n] for n in "csg"), True)
    with pytest.raises(SourceError, match="w: .* divides by a scale of 0"):
        source.read_as(torch.bfloat16)


def test_many_rows_are_worked_on_in_parts(stored: Callable[..., File]) -> None:
    """More than a chunk, in blocks that do not start where chunks do."""
    weight = torch.randn(700, 1000).to(torch.float8_e4m3fn)
    scale = torch.rand(24, 8)
    file = stored(w=weight, s=scale)
    source = BlockFp8("w", file, (700, 1000), file.tensors["w"], file.tensors["s"], (30, 128))
    wide = scale.double().repeat_interleave(30, 0)[:700].repeat_interleave(128, 1)[:, :1000]
    assert torch.equal(source.read_as(torch.float64), weight.double() * wide)
