"""What tests of ops share: seeded draws, errors, and the law of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ingot.compiler.types import TensorType, symbol

T = symbol("T")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| relative to max |expected|."""
    a, b = found.double(), expected.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def parsed(text: str) -> TensorType:
    dtype, dims = text[:-1].split("[")
    return TensorType(dtype, tuple(T if d == "T" else int(d) for d in dims.split(", ") if d))


TOKENS = 70


COUNTS = range(1, TOKENS + 1)


def batches(counts: Any = COUNTS) -> Iterator[slice]:
    """Every count of tokens, cut from the front, the back and an odd place."""
    for n in counts:
        for start in {0, TOKENS - n, min(3, TOKENS - n)}:
            yield slice(start, start + n)


def assert_same_bits(
    f: Callable[..., torch.Tensor], *rows: torch.Tensor, counts: Any = COUNTS
) -> None:
    """`f` of any tokens is the same as of all of them; `rows` have one row a token."""
    together = f(*rows)
    differing = [
        (part.start, part.stop)
        for part in batches(counts)
        if not torch.equal(f(*(x[part].clone() for x in rows)), together[part])
    ]
    assert not differing, f"tokens {differing[:8]} differ from what they are in a batch of {TOKENS}"
    turned = torch.arange(TOKENS).flip(0)
    assert torch.equal(f(*(x[turned] for x in rows))[turned], together), "the order matters"


def tokens_of(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, *size, generator=seeded(seed)).to(dtype)


SOME = (1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 23, 31, 33, 40, 48, 49, 63, 64, 65, 69)


both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
