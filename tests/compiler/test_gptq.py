"""GPTQ: the numbers, against the algorithm that updates the inverse, and against rounding."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ingot.compiler.gptq import gptq, inverse_factor, toward_exact
from ingot.compiler.microscaling import SCALE_RULES, decode, encode

PICO = Path(__file__).parents[2] / "examples" / "pico"


def cost(w: torch.Tensor, packed: tuple[torch.Tensor, ...], gram: torch.Tensor) -> float:
    """|x·(w - ŵ)ᵀ|² for inputs with this Gram matrix."""
    lost = w.double() - decode(*packed, torch.float64)
    return float(((lost @ gram.double()) * lost).sum())


def correlated(seed: int, inner: int, rows: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, K], and the Gram matrix of inputs that lie mostly in a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inner, inner, generator=generator) * torch.logspace(0, -2, inner)[:, None]
    x = torch.randn(rows, inner, generator=generator) @ mix
    return torch.randn(48, inner, generator=generator), x.T @ x


@given(st.integers(0, 2**31), st.sampled_from((16, 32)), st.sampled_from(SCALE_RULES))
@settings(max_examples=20)
def test_never_worse_than_rounding_where_inputs_are_correlated(
    seed: int, group: int, scale: str
) -> None:
    w, gram = correlated(seed, 96)
    found = gptq(w, inverse_factor(gram), group, scale)
    assert cost(w, found, gram) < cost(w, encode(w, group, scale), gram)


def test_much_better_than_rounding_on_average() -> None:
    ratios = []
    for seed in range(8):
        w, gram = correlated(seed, 96)
        ratios.append(cost(w, gptq(w, inverse_factor(gram)), gram) / cost(w, encode(w), gram))
    assert sum(ratios) / len(ratios) < 0.6


def naive(
    w: torch.Tensor, gram: torch.Tensor, group: int, scale: str, damping: float
) -> torch.Tensor:
    """Optimal Brain Quantization in the columns' order, the inverse updated after each: f64.

    (Frantar & Alistarh 2022, arXiv:2208.11580, eqs. 3 and 5.)
    """
    w, gram = w.double().clone(), gram.double()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram))
    inverse = torch.linalg.inv(damped)
    out = torch.empty_like(w)
    for k in range(w.shape[1]):
        if k % group == 0:
            scales = encode(w[:, k : k + group].float(), group, scale)[1]
        column = w[:, [k]].expand(-1, group).float()
        codes = at_scale(column, scales)
        out[:, k] = decode(codes, scales, torch.float64)[:, 0]
        step = (w[:, k] - out[:, k]) / inverse[k, k]
        w -= step[:, None] * inverse[k]
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return out


def at_scale(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`x` [N, group] at given scales: brute force over the codes; ties to the even code."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).double()
    unit = 2.0 ** (scales.double() - 127)
    gap = (x.double().abs()[..., None] - unit[..., None] * values).abs()
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # even codes first
    best = torch.arange(8)[order.argsort()][gap[..., order.argsort().argsort()].argmin(-1)]
    best = torch.where(
        gap.gather(-1, best[..., None])[..., 0] == gap.amin(-1), best, gap.argmin(-1)
    )
    code = (best + 8 * (x < 0)).to(torch.uint8)
    return code[..., ::2] | (code[..., 1::2] << 4)


@pytest.mark.parametrize("scale", ["even", "floor", "ceil"])
@pytest.mark.parametrize("group", [16, 32])
def test_the_same_as_updating_the_inverse_after_each_column(group: int, scale: str) -> None:
    w, gram = correlated(3, 64)
    expected = naive(w, gram, group, scale, 0.01)
    found = decode(*gptq(w, inverse_factor(gram, 0.01), group, scale), torch.float64)
    # Numbers near a tie may fall either way: f32 and f64 part there, and never meet again.
    rows = (found == expected).all(1).double().mean()
    assert rows > 0.8


def test_the_factor_of_the_inverse() -> None:
    _, gram = correlated(0, 64)
    factor = inverse_factor(gram, 0.02).double()
    damped = gram.double() + 0.02 * gram.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(
        factor.T @ factor @ damped, torch.eye(64).double(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("scale", SCALE_RULES)
def test_independent_inputs_leave_rounding_to_nearest(scale: str) -> None:
    w = torch.randn(16, 64)
    found = gptq(w, inverse_factor(torch.eye(64)), 32, scale)
    assert all(map(torch.equal, found, encode(w, 32, scale)))


def test_numbers_far_from_one() -> None:
    w, gram = correlated(1, 64)
    codes, scales = gptq(w, inverse_factor(gram))
    for factor in (2.0**-100, 2.0**100):
        again = gptq(w * factor, inverse_factor(gram))
        assert torch.equal(again[0], codes)
        assert bool((again[1].int() - scales.int() == math.log2(factor)).all())
    zero = gptq(torch.zeros(4, 64), inverse_factor(gram))
    assert not decode(*zero, torch.float32).any()


def test_what_is_refused() -> None:
    w, gram = correlated(0, 64)
    for wrong in (torch.zeros(64, 64), torch.full((64, 64), torch.nan)):
        with pytest.raises(ValueError, match="Gram matrix"):
            inverse_factor(wrong)
    w[3, 4] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        gptq(w, inverse_factor(gram))


def test_weights_make_good_what_their_inputs_lost() -> None:
    """Least squares, half of the way."""
    w, exact = torch.randn(16, 64), torch.randn(300, 64)
    found = exact + 0.3 * torch.randn(300, 64)
    moved = toward_exact(w, (exact - found).T @ found, inverse_factor(found.T @ found, 1e-7))
    best = torch.linalg.lstsq(found, exact @ w.T).solution.T
    torch.testing.assert_close(moved, (w + best) / 2, rtol=0, atol=1e-3)
