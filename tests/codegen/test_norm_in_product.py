"""Norms that a product of few tokens takes along, and those that stay a launch before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ingot.codegen import prices
from ingot.codegen.templates.gemm.dense_gemv import MOST
from ingot.compiler.ir import Op
from ingot.compiler.ops.heads import project_heads
from ingot.compiler.ops.linear import linear
from kernel_checks import Packed, Strided, Weight, build_everywhere, check_node, run_node

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
OPS: dict[str, tuple[Op, dict[str, Any]]] = {
    "linear": (linear, {}),
    "gated": (linear, {"gate": "silu"}),
    "heads": (project_heads, {"heads": (3, 2), "dims": (8, 8)}),
}
ops = pytest.mark.parametrize("name", OPS)
N = 40
# What is rounded is another number than the reference's: x · weight, not the normed x.
ALLOWED = {BF16: 2**-6, F32: None}


def held(dtype: torch.dtype, k: int, group: int) -> Weight | Packed:
    tensor = (torch.randn(N, k) / k**0.5).to(dtype)
    return Packed(tensor, group) if group else Weight(tensor)


def residual_stream(tokens: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of unlike sizes with some columns far beyond the others, as norms see them."""
    x = torch.randn(tokens, k) * torch.logspace(-3, 3, tokens)[:, None]
    x[:, ::31] *= 10
    return x.to(dtype)


def normed(k: int, dtype: torch.dtype) -> dict[str, Any]:
    """A norm of the input, and its eps."""
    return {"norm": Weight(torch.exp(torch.randn(k) / 2).to(dtype)), "eps": 1e-5}


def launches(lowered: Any) -> int:
    (entry,) = lowered.program.entries
    return len(entry.launches)


@ops
@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
@pytest.mark.parametrize(
    ("dtype", "of_norm", "group"),
    [(BF16, BF16, 32), (BF16, F32, 16), (BF16, BF16, 0), (F32, F32, 0), (F32, BF16, 32)],
)
@pytest.mark.parametrize(("tokens", "k"), [(1, 96), (7, 416), (16, 1152)])
def test_launches_of_a_normed_product(
    name: str,
    target: str,
    dtype: torch.dtype,
    of_norm: torch.dtype,
    group: int,
    tokens: int,
    k: int,
) -> None:
    """One, whatever multiplies; and what splits a product of all heads."""
    op, attrs = OPS[name]
    args = (residual_stream(tokens, k, dtype), held(dtype, k, group))
    lowered = check_node(op, args, {**normed(k, of_norm), **attrs}, target, ALLOWED[dtype])
    assert launches(lowered) == (2 if name == "heads" else 1)
    (choice,) = lowered.choices
    assert ", its norm within" in choice.reason
    if target.startswith("hip") and dtype == BF16 and group == 32:
        assert choice.kernels[0] == "mfma_kernel"


@ops
@pytest.mark.parametrize("group", [0, 32])
def test_rounding_is_as_good_as_of_a_norm_before(name: str, group: int) -> None:
    """Nearer to float64 than 1.5 times the reference, which rounds the normed rows; by the median,
    since products of two heavy tails make single elements decide a sum."""
    op, attrs = OPS[name]
    args = (residual_stream(16, 640, BF16), held(BF16, 640, group))
    found, plain, _ = run_node(op, args, {**normed(640, BF16), **attrs})
    best = plain.in_f64().reference()
    for mine, rounded, exact in zip(found, plain.reference(), best, strict=True):
        errors = [(y.double() - exact).abs().median() for y in (mine, rounded)]
        assert errors[0] <= 1.5 * errors[1], errors


@ops
@pytest.mark.parametrize(
    ("dtype", "group", "tokens", "parts"),
    [
        (BF16, 32, 16, ((0, 1), (3, 11), (15, 16))),
        (F32, 32, 16, ((0, 1), (3, 11), (15, 16))),
        (BF16, 0, 16, ((0, MOST + 1), (3, 11))),  # fewer are for another kernel: GEMV
        (BF16, 0, MOST, ((0, 1), (1, 3))),
    ],
)
def test_a_token_has_the_same_bits_in_every_batch(
    name: str, dtype: torch.dtype, group: int, tokens: int, parts: tuple[tuple[int, int], ...]
) -> None:
    op, attrs = OPS[name]
    x, weight = residual_stream(tokens, 288, dtype), held(dtype, 288, group)
    named = {**normed(288, dtype), **attrs}
    together, _, _ = run_node(op, (x, weight), named)
    for start, stop in parts:
        alone, _, _ = run_node(op, (x[start:stop], weight), named)
        for mine, all_of in zip(alone, together, strict=True):
            assert torch.equal(mine, all_of[start:stop])


def test_rows_that_lie_apart() -> None:
    for group in (0, 32):
        args = (Strided(residual_stream(9, 96, BF16)), held(BF16, 96, group))
        lowered = check_node(linear, args, normed(96, BF16), tolerance=ALLOWED[BF16])
        assert launches(lowered) == 1


def test_every_epilogue_comes_after_the_scale() -> None:
    for group in (0, 32):
        args = (residual_stream(5, 96, BF16), held(BF16, 96, group))
        named = {**normed(96, BF16), "bias": Weight(torch.randn(N).to(BF16))}
        for last in ({"residual": torch.randn(5, N).to(BF16)}, {"gate": "gelu"}):
            lowered = check_node(linear, args, {**named, **last}, tolerance=ALLOWED[BF16])
            assert launches(lowered) == 1


def test_a_row_of_zeros() -> None:
    """eps alone is under the root."""
    for group in (0, 32):
        x = residual_stream(3, 96, BF16)
        x[1] = 0
        found, _, _ = run_node(linear, (x, held(BF16, 96, group)), normed(96, BF16))
        assert found[0][1].eq(0).all()
        assert found[0].isfinite().all()


# What stays a launch before the product -> dtype, dtype of the norm, group, tokens, and why.
FIRST: dict[str, tuple[torch.dtype, torch.dtype, int, int, str]] = {
    "many tokens": (BF16, BF16, 0, 17, "tokens are many"),
    "f16": (F16, F16, 0, 2, "a product of unnormed f16 may leave its range"),
    "fragments by f32": (BF16, F32, 32, 2, "fragments are of bf16, its weight is f32"),
}


@pytest.mark.parametrize("case", FIRST)
def test_norms_that_stay_before(case: str) -> None:
    dtype, of_norm, group, tokens, why = FIRST[case]
    args = (torch.randn(tokens, 96).to(dtype), held(dtype, 96, group))
    lowered = check_node(linear, args, normed(96, of_norm))
    (choice,) = lowered.choices
    assert choice.kernels[0] == "prologue_kernel"
    assert choice.reason.endswith(f", after its norm: {why}")


def test_a_sum_that_is_a_result_stays_before() -> None:
    x, delta = torch.randn(2, 2, 96).to(BF16)
    named = {**normed(96, BF16), "delta": delta}
    lowered = check_node(linear, (x, held(BF16, 96, 32)), named)
    (choice,) = lowered.choices
    assert choice.kernels == ("prologue_kernel", "fragment_kernel")
    assert choice.reason.endswith("the sum before it is a result")


@pytest.mark.parametrize("group", [0, 32])
def test_a_large_product_stays_after(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes as it is held."""
    weight = held(BF16, 96, group)
    size = N * 96 * 2 if not group else 48 * 64 + 48 // 16 * 64
    # A fiftieth of a launch more: prices are compared to the nanosecond.
    for most, count in ((size, 1), (size - size // 50, 2)):
        monkeypatch.setattr(prices, "NORM_WITHIN_BYTES", most)
        args = (torch.randn(2, 96).to(BF16), weight)
        named = normed(96, BF16)
        # For sm_90 norms within were measured.
        lowered = check_node(linear, args, named, "cuda:sm_100", tolerance=ALLOWED[BF16])
        assert launches(lowered) == count


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("group", [0, 32])
def test_built_for_every_target(tokens: int, group: int) -> None:
    w = torch.zeros(6144, 4096, dtype=BF16)
    x, of_norm = torch.empty(tokens, 4096, dtype=BF16), Weight(torch.ones(4096, dtype=BF16))
    named = {"norm": of_norm, "gate": "silu", "eps": 1e-5}
    facts = build_everywhere(linear, (x, Packed(w) if group else Weight(w)), named)
    if group:
        # For 16 tokens a launch before is faster, as measured on sm_90, and estimated on AMD.
        before = {"hip:gfx942", "hip:gfx950", "cuda:sm_90"} if tokens == 16 else set[str]()
        counts = {target: len(found) for target, found in facts.items()}
        assert counts == {target: 1 + (target in before) for target in facts}
        # A program of eight warps leaves room for another on the multiprocessor.
        assert tokens > 8 or facts["cuda:sm_90"][0]["registers"] <= 128
