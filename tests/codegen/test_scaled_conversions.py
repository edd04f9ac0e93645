"""MXFP4 decoded by scaled conversions: which byte, nibble and half goes where."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from amd_asm import run
from ingot.codegen.kernel_query import Arg, Call, Result
from ingot.codegen.templates.gemm.mxfp4_decode import decoded, scaled_tile
from ingot.compiler.microscaling import decode
from ingot.compiler.ops.linear import head_linear, linear
from interpreted import run_call
from kernel_checks import Packed, check_node

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ROWS, BLOCK = 32, 256


@triton.jit
def decode_kernel(
    codes,
    scales,
    out,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]
    scale = tl.load(scales + row * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)[None, :])
    if SCALED:
        words = codes.to(tl.pointer_type(tl.int32)) + row * (BLOCK // 8)
        found = tl.load(words + tl.arange(0, BLOCK // 8)[None, :])
        tile = scaled_tile(found, scale, ROWS, BLOCK, GROUP, DTYPE)
    else:
        code = tl.load(codes + row * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :])
        tile = decoded(code, scale, ROWS, BLOCK, GROUP, DTYPE)
    tl.store(out + row * BLOCK + tl.arange(0, BLOCK)[None, :], tile)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_byte_under_every_scale(dtype: torch.dtype, group: int, scaled: bool) -> None:
    """Bit for bit the reference, whose NaN (scale 255) may be any."""
    codes = torch.randint(0, 256, (ROWS, BLOCK // 2), dtype=torch.uint8)
    codes[:2] = torch.arange(256, dtype=torch.uint8).view(2, -1)
    scales = (torch.randperm(ROWS * BLOCK // group) % 256).to(torch.uint8).view(ROWS, -1)
    out = torch.empty(ROWS, BLOCK, dtype=dtype)
    constants = {
        "ROWS": ROWS,
        "BLOCK": BLOCK,
        "GROUP": group,
        "SCALED": scaled,
        "DTYPE": DTYPES[dtype],
    }
    args = {"codes": Arg(0), "scales": Arg(1), "out": Result(0)}
    call = Call(decode_kernel, {**args, **constants}, (1, 1, 1), (Result(0),))
    run_call(call, {Arg(0): codes, Arg(1): scales, Result(0): out})
    expected = decode(codes, scales, dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    same = out.view(bits) == expected.view(bits)
    assert bool((same | expected.isnan()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 40, 96), (5, 17, 160), (37, 70, 96)])
def test_products(tokens: int, n: int, k: int, dtype: torch.dtype, group: int) -> None:
    w = Packed((torch.randn(n, k) / k**0.5).to(dtype), group)
    check_node(linear, (torch.randn(tokens, k).to(dtype), w), target="hip:gfx950")


def test_products_with_a_gate_and_of_heads() -> None:
    x = torch.randn(3, 64).bfloat16()
    w = Packed((torch.randn(48, 64) / 8).bfloat16())
    check_node(linear, (x, w), {"gate": "silu"}, target="hip:gfx950")
    heads = Packed((torch.randn(3, 24, 64) / 8).bfloat16())
    check_node(head_linear, (torch.randn(18, 3, 64).bfloat16(), heads), target="hip:gfx950")


def test_what_the_model_does_not_know_is_refused() -> None:
    word = torch.zeros(4, dtype=torch.int32).numpy()
    one = torch.ones(4).numpy()
    with pytest.raises(AssertionError, match="unknown instruction"):
        run("v_cvt_scalef32_pk_f32_fp8 $0, $1, $2", "=&v,v,v", [word, one])
    with pytest.raises(AssertionError):
        run("v_cvt_scalef32_pk_f32_fp4 $0, $1, $2", "=v,v,v", [word, one])
