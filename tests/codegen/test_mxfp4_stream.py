"""The MXFP4 stream of few tokens: what its PTX computes, statement by statement, and its size."""

from __future__ import annotations

from typing import Any

import gluon_numpy
import ptx_asm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.codegen.build import build_one
from ingot.codegen.templates.gemm import mxfp4_stream
from ingot.codegen.templates.gemm.epilogue import Epilogue
from ingot.codegen.templates.gemm.product import Rows
from ingot.codegen.templates.gemm.weight import Weight as KernelWeight
from ingot.compiler.microscaling import decode
from ingot.compiler.ops.linear import linear
from ingot.compiler.ops.mxfp4_fragments import mxfp4_fragments
from ingot.compiler.target import target_of
from ingot.compiler.types import TensorType
from kernel_assembly import HeldPacked, sources
from kernel_checks import ON_DEVICE, Packed, Weight, check_node

BF16 = torch.bfloat16
interpreted = pytest.mark.skipif(ON_DEVICE, reason="statement by statement, in the interpreter")


def stream(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, **more: Any) -> torch.Tensor:
    """y f32 [T, N] of bf16 x and a weight by rows; `more` are constants of the kernel."""
    (tokens, k), n = x.shape, codes.shape[0]
    tiles, blocks = mxfp4_fragments.reference(codes, scales)
    y = torch.full((tokens, n), torch.nan)
    weight = KernelWeight(
        tiles.flatten(), blocks.flatten(), n, k, 32, False, tiles.shape[1], False, k, 1, n * k
    )
    down, across = tiles.shape[:2]
    constants = mxfp4_stream.constants(tokens, down, across, multiprocessors=2)
    args = {
        "x": Rows(x, k, 0),
        "weight": weight,
        "norm": None,
        "epilogue": Epilogue(y, None, None, n, 0, None, False, 0.0, 0.0, False),
        "N": n,
        **constants,
        "AHEAD": True,
        "PROGRAMMATIC": False,
        **more,
    }
    gluon_numpy.run(mxfp4_stream.stream_kernel, (args["PROGRAMS"], 1, 1), args)
    return y


def drawn(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(115, 135, (n, k // 32), generator=generator, dtype=torch.uint8)
    return codes, scales


def error(y: torch.Tensor, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    expected = x.double() @ decode(codes, scales, torch.float64).T
    return ((y.double() - expected).norm() / expected.norm()).item()


@interpreted
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 8),
    n=st.integers(1, 90),
    groups=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_sums_are_those_of_f64(tokens: int, n: int, groups: int, seed: int) -> None:
    codes, scales = drawn(n, 32 * groups, seed)
    x = torch.randn(tokens, 32 * groups, generator=torch.Generator().manual_seed(seed)).to(BF16)
    assert error(stream(x, codes, scales), x, codes, scales) < 1e-6


@interpreted
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [512, 4096, 8192])
def test_passes_and_blocks(tokens: int, k: int) -> None:
    """Several passes over the tiles of a program, over one block of columns or more."""
    codes, scales = drawn(16 * 5 - 5, k)
    x = torch.randn(tokens, k).to(BF16)
    y = stream(x, codes, scales, MOST=2, PROGRAMS=1)
    assert error(y, x, codes, scales) < 1e-6
    later = stream(x, codes, scales, MOST=2, PROGRAMS=1, AHEAD=False)
    assert torch.equal(y, later)


@interpreted
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_the_ends_of_the_scales(tokens: int) -> None:
    codes, scales = drawn(32, 256)
    scales[:] = 0  # 2^-127
    x = torch.full((tokens, 256), 2.0**62).to(BF16)
    assert error(stream(x, codes, scales), x, codes, scales) < 1e-6
    scales[:] = 127
    scales[3, 5] = 255  # NaN
    codes[3] |= 0x11
    y = stream(x / 2**62, codes, scales)
    live = torch.arange(32) != 3
    assert y[:, live].isfinite().all() and not y[:, 3].isfinite().any()


@interpreted
def test_a_padded_tile_takes_nothing_from_what_lies_beside_it() -> None:
    """The tiles of a row are odd in number, and what follows them has NaN for scales."""
    codes, scales = drawn(32, 384)
    scales[16:] = 255
    x = torch.randn(1, 384).to(BF16)
    y = stream(x, codes, scales)[:, :16]
    assert error(y, x, codes[:16], scales[:16]) < 1e-6


@interpreted
def test_a_wait_that_is_too_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = drawn(64, 2048)
    short = lambda steps: f"cp.async.wait_group {steps + 1}; mov.b32 $0, 0;"  # noqa: E731
    monkeypatch.setattr(mxfp4_stream, "on_their_way", short)
    x = torch.ones(1, 2048).to(BF16)
    # Without the waits that pace the first fill, which are too short as well.
    assert not error(stream(x, codes, scales, AHEAD=False), x, codes, scales) < 0.1


@interpreted
def test_a_missing_barrier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = drawn(64, 2048)
    monkeypatch.setattr(ptx_asm.Machine, "barrier", lambda self: None)
    with pytest.raises(AssertionError, match="read before a barrier"):
        stream(torch.ones(1, 2048).to(BF16), codes, scales)


BIAS = {"bias": Weight(torch.randn(96).to(BF16))}


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(
    "named",
    [{}, BIAS, {"gate": "silu"}, {"norm": None}, {"gate": "gelu_tanh", "norm": None}],
    ids=("alone", "bias", "gate", "norm", "gate and norm"),
)
def test_linear(tokens: int, named: dict[str, Any]) -> None:
    """With what may stand before a product and behind it."""
    normed = "norm" in named
    if normed:
        named = {**named, "norm": Weight((1 + 0.1 * torch.randn(2880)).to(BF16)), "eps": 1e-6}
    x, w = torch.randn(tokens, 2880).to(BF16), torch.randn(96, 2880).to(BF16)
    prefer = "stream MXFP4" + (" normed" if normed else "")
    lowered = check_node(linear, (x, Packed(w)), named, prefer=prefer)
    assert [k.symbol for k in lowered.program.kernels.values()] == ["stream_kernel"]


@pytest.mark.skipif(ON_DEVICE, reason="nothing runs")
@pytest.mark.parametrize("name", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (5120, 2880)])
def test_two_launches_fit_on_a_multiprocessor(tokens: int, n: int, k: int, name: str) -> None:
    target = target_of(name)
    args = (TensorType("bf16", (tokens, k)), HeldPacked(TensorType("bf16", (n, k))))
    (source,) = sources(linear, args, {}, name, prefer="stream MXFP4")
    facts = build_one(source, target).facts
    threads = source.num_warps * target.warp
    # Of a multiprocessor's 512 threads two launches' programs are made of.
    assert facts["spills"] == 0 and facts["registers"] * 512 <= 65536
    assert (facts["shared"] + 1024) * 512 <= target.shared_bytes * threads
