"""Kernels that move whole rows: lookups and the cache's append."""

from __future__ import annotations

import pytest
import torch
from ingot.compiler.ops.attention import kv_append
from ingot.compiler.ops.linear import embedding
from ingot.compiler.ops.shape import take
from kernel_checks import Strided, Weight, check_node

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 1500])
def test_embedding(dtype: torch.dtype, width: int) -> None:
    table = torch.randn(11, width).to(dtype)
    ids = torch.randint(0, 11, (5,), dtype=torch.int32)
    check_node(embedding, (ids, Weight(table)), tolerance=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (6, 3, 5)])
def test_take(shape: tuple[int, ...]) -> None:
    rows = torch.tensor([5, 0, 5], dtype=torch.int32)
    check_node(take, (torch.randn(shape), rows), tolerance=1e-9)
    check_node(take, (torch.randint(0, 99, shape), rows))


def test_take_by_several_dims_of_rows() -> None:
    rows = torch.tensor([[5, 0], [3, 5], [1, 1]])
    check_node(take, (torch.randn(6), rows), tolerance=1e-9)
    check_node(take, (torch.randn(6, 3, 5), rows), tolerance=1e-9)


def test_take_of_a_slice() -> None:
    rows = torch.tensor([2, 0], dtype=torch.int32)
    check_node(take, (Strided(torch.randn(4, 10)), rows), tolerance=1e-9)


@pytest.mark.parametrize("inner", [(3, 8), (80,)])
def test_kv_append(inner: tuple[int, ...]) -> None:
    caches = [torch.randn(6, 4, *inner).bfloat16() for _ in range(2)]
    rows = [Strided(torch.randn(5, *inner).bfloat16()), torch.randn(5, *inner).bfloat16()]
    slots = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
    positions = torch.tensor([0, 5, 3, 6, 11], dtype=torch.int32)
    pages = torch.tensor([[4, 2, 1], [0, 5, 3]], dtype=torch.int32)
    check_node(kv_append, (*caches, *rows, slots, positions, pages), tolerance=1e-9)
